"""Weights of rows: read, checked, stored, described, and handed out with their rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.data_pipelines.importers.registry import IMPORTERS, make_importer
from embcomp.data_pipelines.integrity import record_of
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.sample_weights import WEIGHT_COLUMN, are_equal
from embcomp.data_pipelines.schema import FILE_NAME, DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.data_pipelines.validate import validate_dataset
from embcomp.errors import DataError
from embcomp.search.evaluators.dataset_view import write_view
from tests.data_pipelines.test_values import ALL_TRAIN, table
from tests.helpers.raw_logs import read_split, write_criteo

WEIGHTS = [2.0, 0.0, 0.1, 10.0, 3.5, 1e-30]
SHARES = {"kind": "chronological", "train": 0.5, "valid": 0.5, "test": 0.0}


def frame(weights: Sequence[object] = WEIGHTS, name: str = "w") -> pl.DataFrame:
    rows = range(len(weights))
    numbers = pl.Series(name, weights, strict=False)
    return pl.DataFrame(
        {"y": [n % 2 for n in rows], "u": [f"u{n % 3}" for n in rows], name: numbers}
    )


def prepared(folder: Path, raw: Path, *, weight: str | None = None, split=SHARES, **schema):
    importer = table(**{"categorical": ["u"], "weight": "w"} | schema)
    return prepare(raw, folder / "out", importer=importer, split=split, weight=weight)


def csv(folder: Path, weights: list[str]) -> Path:
    lines = [f"{n % 2},u{n % 3},{weight}\n" for n, weight in enumerate(weights)]
    (folder / "raw.csv").write_text("y,u,w\n" + "".join(lines))
    return folder / "raw.csv"


@pytest.mark.parametrize("form", ["csv", "quoted csv", "parquet", "partition"])
def test_weights_are_stored_beside_labels_and_their_sums_are_described(tmp_path, form):
    expected = WEIGHTS
    if form == "partition":
        expected = [0.5, 0.5, 4.0, 4.0]
        for value in ("0.5", "4"):
            (tmp_path / "raw" / f"w={value}").mkdir(parents=True)
            part = frame([0, 0]).drop("w")
            part.write_parquet(tmp_path / "raw" / f"w={value}" / "part.parquet")
        raw = tmp_path / "raw"
    elif form == "parquet":
        raw = tmp_path / "raw.parquet"
        frame().write_parquet(raw)
    else:
        mark = '"' if form == "quoted csv" else ""
        raw = csv(tmp_path, [f"{mark}{weight}{mark}" for weight in WEIGHTS])
    info = prepared(tmp_path, raw)
    assert info.weight == WEIGHT_COLUMN
    stored = [read_split(info, split) for split in ("train", "valid")]
    assert stored[0].columns == ["label", WEIGHT_COLUMN, "u"]
    found = [row for rows in stored for row in rows[WEIGHT_COLUMN].to_list()]
    assert found == np.float32(expected).tolist()
    for split, rows in zip(("train", "valid"), stored):
        total = math.fsum(rows[WEIGHT_COLUMN].to_list())
        assert info.splits[split].weight == pytest.approx(total, rel=1e-11)
    assert validate_dataset(info.folder).digest == info.digest


@pytest.mark.parametrize("way", ["python", "command"])
def test_prepare_names_the_column_in_place_of_the_schema(tmp_path, way):
    frame(name="importance").write_parquet(tmp_path / "raw.parquet")
    if way == "python":
        info = prepared(tmp_path, tmp_path / "raw.parquet", weight="importance")
    else:
        (tmp_path / "x.yaml").write_text("{name: x, label: y, categorical: [u]}")
        words = ["prepare", "table", tmp_path / "raw.parquet", tmp_path / "out", "--schema"]
        words += [tmp_path / "x.yaml", "--split", "chronological", "--weight", "importance"]
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        assert "weighted rows" in result.stdout
        info = DatasetInfo.load(tmp_path / "out")
        assert "weight" in CliRunner().invoke(app, ["cat", str(tmp_path / "out")]).stdout
    assert info.weight == WEIGHT_COLUMN
    assert info.raw_format.options["schema"]["weight"] == "importance"


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (None, "missing, or no number"),
        ("nan", "nan"),
        ("-1", "-1"),
        ("inf", "inf"),
        ("1e39", r"1e\+39"),
        ("1e-60", "1e-60"),
        ("heavy", "missing, or no number"),
    ],
)
def test_a_row_whose_weight_is_none_ends_prepare_with_its_place(tmp_path, form, bad, said):
    weights = ["1", "2", bad, "1"]
    if form == "csv":
        raw, line = csv(tmp_path, ["" if weight is None else weight for weight in weights]), 4
    elif bad == "heavy":
        pytest.skip("a column of text has its own sentence")
    else:
        raw, line = tmp_path / "raw.parquet", 3
        numbers = [None if weight is None else float(weight) for weight in weights]
        frame(numbers).write_parquet(raw)
    # Not set aside as another malformed row would be, however many are allowed.
    with pytest.raises(
        DataError, match=rf"raw\.\w+, line {line}: the weight 'w' is {said};"
    ) as info:
        prepare(
            raw,
            tmp_path / "out",
            importer=table(categorical=["u"], weight="w"),
            split=ALL_TRAIN,
            max_bad_rows=1.0,
        )
    assert "\n" not in str(info.value)
    assert "0 leaves a row out" in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == [raw.name]


def test_rows_that_the_label_leaves_out_need_no_weight(tmp_path):
    rows = pl.DataFrame({"y": [1, 5, 3], "u": ["a", "b", "c"], "w": [2.0, 1.0, None]})
    rows.write_parquet(tmp_path / "raw.parquet")
    label = {"column": "y", "positive": "> 3", "negative": "< 3"}
    info = prepared(tmp_path, tmp_path / "raw.parquet", label=label, split=ALL_TRAIN)
    assert info.splits["train"].weight == 3 and info.dropped_rows == 1


def refused(tmp_path, raw, match: str, **schema) -> None:
    with pytest.raises(DataError, match=match) as info:
        prepared(tmp_path, raw, **schema)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "out").exists()


def test_a_file_without_the_column_is_named(tmp_path):
    (tmp_path / "raw").mkdir()
    frame().write_parquet(tmp_path / "raw" / "a.parquet")
    frame().drop("w").write_parquet(tmp_path / "raw" / "b.parquet")
    refused(tmp_path, tmp_path / "raw", r"b\.parquet has no column 'w'")


@pytest.mark.parametrize("value", ["heavy", "__HIVE_DEFAULT_PARTITION__", "-1"])
def test_a_partition_whose_name_is_no_weight_is_named(tmp_path, value):
    (tmp_path / "raw" / f"w={value}").mkdir(parents=True)
    frame([0, 0]).drop("w").write_parquet(tmp_path / "raw" / f"w={value}" / "part.parquet")
    refused(tmp_path, tmp_path / "raw", f"w={value}")


def test_a_column_of_text_is_named(tmp_path):
    frame([f"about {weight}" for weight in WEIGHTS]).write_parquet(tmp_path / "raw.parquet")
    refused(tmp_path, tmp_path / "raw.parquet", "column 'w' holds String")


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_split_whose_weights_are_all_zero_is_refused(tmp_path, split):
    weights = [0.0, 0.0, 1.0, 2.0]
    raw = tmp_path / "raw.parquet"
    frame(weights if split == "train" else weights[::-1]).write_parquet(raw)
    refused(tmp_path, raw, f"all 2 rows of the {split} split have the weight 0")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"numeric": ["w"]}, "'w' is the weight and a feature too"),
        ({"categorical": [{"name": "x", "column": "w"}]}, "'w' is the weight and a feature too"),
        ({"weight": "y"}, "'y' is the weight and the label too"),
        ({"categorical": [WEIGHT_COLUMN]}, "no feature may have it"),
    ],
)
def test_a_column_is_a_weight_or_something_else(tmp_path, schema, said):
    with pytest.raises(ValueError, match=said):
        table(**{"categorical": ["u"], "weight": "w"} | schema)
    weight = schema.pop("weight", "w")
    with pytest.raises(DataError, match=said) as info:
        table(**{"categorical": ["u"]} | schema).weighted_by(weight)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", sorted(set(IMPORTERS) - {"table"}))
def test_formats_without_a_place_for_weights_say_so(tmp_path, name):
    with pytest.raises(
        DataError, match=f"rows of the format '{name}' have no column 'w' of weights"
    ):
        prepare(tmp_path, tmp_path / "out", importer=name, weight="w")


@pytest.mark.parametrize("line", ["1:0.5 451:1 20:1", "0:2\t3:451:1", "-1:1e-3 user:7"])
def test_weights_behind_libfm_labels_are_refused_by_name(tmp_path, line):
    (tmp_path / "raw.libfm").write_text(f"{line}\n" * 3)
    with pytest.raises(DataError, match=r"line 1: it begins with .*`table` importer and `weight"):
        prepare(tmp_path / "raw.libfm", tmp_path / "out", importer="libfm", split=ALL_TRAIN)


def test_without_weights_nothing_of_them_is_written(tmp_path):
    write_criteo(tmp_path / "train.txt", 50)
    frame().drop("w").write_parquet(tmp_path / "raw.parquet")
    for raw, importer in (
        ("train.txt", make_importer("criteo")),
        ("raw.parquet", table(categorical=["u"])),
    ):
        info = prepare(tmp_path / raw, tmp_path / "out", importer=importer, overwrite=True)
        text = (info.folder / FILE_NAME).read_text()
        assert '"weight"' not in text
        assert DatasetInfo.load(info.folder).weight is None
        assert next(iter(ParquetLoader(info, "train", batch_size=2))).weights is None
        content = json.loads(text)
        for kept in ("digest", "sources"):
            content.pop(kept)
        assert content == info.model_dump(mode="json", exclude={"digest", "sources"})


def test_the_sums_do_not_depend_on_how_the_input_is_cut_into_parts(tmp_path):
    weights = np.random.default_rng(0).random(3000).tolist()
    frame(weights).write_parquet(tmp_path / "raw.parquet", row_group_size=100)
    importer = table(categorical=["u"], weight="w")
    infos = [
        prepare(
            tmp_path / "raw.parquet", tmp_path / f"{size}", importer=importer, blocks_per_part=size
        )
        for size in (3, 128)
    ]
    one, other = ([split.weight for split in info.splits.values()] for info in infos)
    assert one == other and sum(one) == pytest.approx(math.fsum(weights), rel=1e-6)


def rewritten(info: DatasetInfo, value: float) -> Path:
    """A dataset whose first training weight is another, with checksums that agree."""
    name = info.splits["train"].files[0]
    rows = pl.read_parquet(info.folder / name)
    changed = rows[WEIGHT_COLUMN].to_list()
    changed[0] = value
    schema = pq.read_schema(info.folder / name)
    whole = rows.with_columns(pl.Series(WEIGHT_COLUMN, changed, pl.Float32)).to_arrow().cast(schema)
    pq.write_table(whole, info.folder / name, write_page_checksum=True)
    info.checksums[name] = record_of(info.folder / name, info.checksums[name].positives)
    info.save(info.folder)
    return info.folder


@pytest.mark.parametrize(
    ("value", "by_validate", "by_loader"),
    [
        (-1.0, "holds weights below 0", "weight 'sample_weight' is -1"),
        (math.nan, "not finite", "weight 'sample_weight' is nan"),
        (77.0, "stated to sum to", None),
    ],
)
def test_weights_that_changed_are_found(tmp_path, value, by_validate, by_loader):
    folder = rewritten(write_toy_dataset(tmp_path, weights=(1, 2, 3)), value)
    with pytest.raises(DataError, match=by_validate):
        validate_dataset(folder)
    if by_loader is not None:
        with pytest.raises(DataError, match=by_loader):
            list(ParquetLoader(folder, "train", batch_size=64, prefetch=0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("weight"), "no column of them is named"),
        (lambda d: d["splits"]["valid"].pop("weight"), "split 'valid' states no sum"),
        (lambda d: d.update(weight="C1"), "column names used twice"),
        (lambda d: d["splits"]["train"].update(weight=-1), "greater than or equal to 0"),
    ],
)
def test_descriptions_that_contradict_themselves_are_named(tmp_path, change, said):
    write_toy_dataset(tmp_path, weights=(1, 2))
    content = json.loads((tmp_path / FILE_NAME).read_text())
    change(content)
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        DatasetInfo.load(tmp_path)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_bring_each_row_its_own_weight(tmp_path, shuffle, world_size):
    info = write_toy_dataset(tmp_path, rows=(301, 40, 40), weights=np.arange(1, 600).tolist())
    own = {
        row["I1"]: row[WEIGHT_COLUMN]
        for row in read_split(info, "train").select("I1", WEIGHT_COLUMN).iter_rows(named=True)
    }
    seen = 0
    for rank in range(world_size):
        loader = ParquetLoader(
            info,
            "train",
            batch_size=16,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            drop_last=False,
            shuffle_buffer=64,
        )
        for batch in loader:
            assert (
                batch.weights.dtype == torch.float32 and batch.weights.shape == batch.labels.shape
            )
            assert batch.to(torch.device("cpu")).weights is not None
            for x, weight in zip(batch.dense[:, 0].tolist(), batch.weights.tolist()):
                assert own[x] == weight
            seen += len(batch.labels) if batch.num_valid is None else batch.num_valid
    assert seen == 301


def test_a_view_for_candidates_has_the_weights_of_its_rows(tmp_path):
    info = write_toy_dataset(tmp_path / "data", weights=(0.5, 2, 7))
    view = validate_dataset(write_view(info.folder, tmp_path / "view", valid_rows=50))
    rows = read_split(view, "valid")
    assert are_equal(view.splits["valid"].weight, rows[WEIGHT_COLUMN].sum())
    assert view.splits["train"].weight == info.splits["train"].weight
