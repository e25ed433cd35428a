"""Raw rows are encoded as `prepare` writes them, to the bit, in every format, labelled or not."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from embcomp.data_pipelines.importers.libfm import LibFMImporter
from embcomp.data_pipelines.importers.registry import importer_of, make_importer
from embcomp.data_pipelines.importers.table import TableImporter
from embcomp.data_pipelines.importers.table_schema import TableSchema
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import DataError
from embcomp.serving.raw_encoder import RawEncoder
from tests.helpers.raw_logs import criteo_bytes, criteo_rows

ROWS = 90
MOVIES = {
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
    "movies.dat": "10::Les (1995)::Drama|Musical\n11::Jumanji (1995)::Comedy\n12::X::\n",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A raw log, the same rows without labels, and what `prepare` is told of them."""

    file: str
    labelled: str | bytes
    unlabelled: str | bytes
    importer: Any
    beside: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def criteo() -> Case:
    rows = criteo_rows(ROWS)
    return Case(
        file="train.txt",
        labelled=criteo_bytes(rows),
        unlabelled=criteo_bytes([row[1:] for row in rows]),
        importer="criteo",
        settings={
            "min_count": 2,
            "numeric": {"I2": "min_max", "I3": "bucket", "I5": "standard_log", "I6": "none"},
            "group": "C1",
        },
    )


def avazu() -> Case:
    names = "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,"
    names += "app_category,device_id,device_ip,device_model,device_type,device_conn_type,"
    names += ",".join(f"C{i}" for i in range(14, 22))
    lines = [names] + [
        f"{i},{i % 3 // 2},141021{i % 24:02d}," + ",".join(f"v{i % (j + 2)}" for j in range(21))
        for i in range(ROWS)
    ]
    bare = [",".join(line.split(",")[:1] + line.split(",")[2:]) for line in lines]
    return Case(
        file="train.csv",
        labelled="\r\n".join(lines) + "\r\n",
        unlabelled="\n".join(bare),
        importer="avazu",
        settings={"min_count": 9},
    )


def movielens(fields: int) -> Case:
    lines = [[1 + i % 2, 10 + i % 4, (1, 2, 4, 5)[i * 7 % 4], i] for i in range(ROWS)]
    bare = [line[:2] + line[3:fields] for line in lines]
    return Case(
        file="ratings.dat",
        labelled="".join("::".join(map(str, line)) + "\n" for line in lines),
        unlabelled="".join("::".join(map(str, line)) + "\n" for line in bare),
        importer="movielens",
        beside=MOVIES,
    )


def libfm(tokens, **options) -> Case:
    lines = [" ".join(tokens(i)) for i in range(ROWS)]
    return Case(
        file="log.libfm",
        labelled="".join(f"{i % 2} {line}\n" for i, line in enumerate(lines)),
        unlabelled="".join(f"{line}\n" for line in lines),
        importer=LibFMImporter(**options),
    )


def table(file: str, header: bool, **schema) -> Case:
    document = {
        "name": "shop",
        "label": {"column": "stars", "positive": "> 3", "negative": "< 3"},
        "numeric": [
            {"name": "price", "transform": "min_max"},
            {"name": "age", "column": "the age"},
        ],
        "categorical": ["user", {"name": "tags", "separator": "|"}],
        "null_values": ["NA"],
        "split": {"kind": "time", "column": "day", "train": 1.0, "valid": 0.0, "test": 0.0},
    }
    names = ["stars", "user", "price", "the age", "tags", "day"]
    rows = [
        [
            (1, 2, 4, 5)[i * 3 % 4],
            f"u{i % 7}" if i % 5 else "NA",
            i / 7,
            "" if i % 4 else i,
            "|".join(f"t{j}" for j in range(i % 3)),
            i,
        ]
        for i in range(ROWS)
    ]
    bare = [row[1:5] for row in rows]
    first = [names] if header else []
    bare_first = [names[1:5]] if header else []
    if not header:
        document["columns"] = names
        bare = [row[1:] for row in rows]
    text = "".join(",".join(map(str, row)) + "\n" for row in first + rows)
    bare_text = "".join(",".join(map(str, row)) + "\n" for row in bare_first + bare)
    importer = TableImporter(schema=TableSchema.model_validate(document | schema))
    return Case(file=file, labelled=text, unlabelled=bare_text, importer=importer)


CASES = {
    "criteo": criteo(),
    "avazu": avazu(),
    "movielens": movielens(fields=4),
    "movielens without times": movielens(fields=3),
    "indices": libfm(lambda i: [f"{i % 5}:1", f"{7 + i % 3}:1"]),
    "bag": libfm(lambda i: [f"{j}:1" for j in range(i % 4 + 1)]),
    "pairs": libfm(lambda i: [f"3:{i % 4}0", f"17:{i}", "17:5"]),
    "named pairs": libfm(lambda i: [f"user:{i % 4}.0", f"field_3:x{i % 9}"], form="pairs"),
    "ffm": libfm(lambda i: [f"{j}:{i % (j + 2)}:1" for j in range(3)]),
    "csv": table("shop.csv", header=True),
    "csv without a header": table("shop.csv", header=False),
}


@dataclass(frozen=True, kw_only=True)
class Written:
    """A case on disk."""

    info: DatasetInfo
    labelled: Path
    unlabelled: Path


def write(case: Case, folder: Path) -> Written:
    for name, content in (("with", case.labelled), ("without", case.unlabelled)):
        (folder / name).mkdir()
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name / case.file).write_bytes(data)
        for other, text in case.beside.items():
            (folder / name / other).write_text(text)
    split: Any = {"kind": "chronological", "train": 1.0, "valid": 0.0, "test": 0.0}
    if isinstance(case.importer, TableImporter):
        split = None
    labelled = folder / "with" / case.file
    info = prepare(labelled, folder / "out", importer=case.importer, split=split, **case.settings)
    return Written(info=info, labelled=labelled, unlabelled=folder / "without" / case.file)


def encoder_of(info: DatasetInfo) -> RawEncoder:
    assert info.raw_format is not None
    return RawEncoder(info, importer_of(info.raw_format, "here"))


def joined(batches) -> dict[str, torch.Tensor]:
    """All rows of some batches as plain tensors."""
    batches = list(batches)
    keys = batches[0].sparse.keys()
    found = {"dense": torch.cat([b.dense for b in batches])}
    found["labels"] = torch.cat([b.labels for b in batches])
    for key in keys:
        found[key] = torch.cat([b.sparse[key].values() for b in batches])
        found[f"{key} lengths"] = torch.cat([b.sparse[key].lengths() for b in batches])
    if batches[0].groups is not None:
        found["groups"] = torch.cat([b.groups for b in batches])
    return found


@pytest.mark.parametrize("name", CASES)
def test_raw_rows_are_encoded_as_they_were_prepared(name, tmp_path, monkeypatch):
    written = write(CASES[name], tmp_path)
    wanted = joined(ParquetLoader(written.info, "train", batch_size=32, drop_last=False))
    assert any(bool((wanted[n] > 1).any()) for n in written.info.categorical_names)
    rows_of = encoder_of(DatasetInfo.load(tmp_path / "out"))
    # Blocks end where batches do not.
    monkeypatch.setattr("embcomp.data_pipelines.importers.text.BLOCK_BYTES", 600)
    found = joined(rows_of.batches(written.labelled, batch_size=13))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    bare = joined(rows_of.batches(written.unlabelled, batch_size=40))
    assert bool(bare.pop("labels").isnan().all())
    for key, value in bare.items():
        assert torch.equal(value, wanted[key]), key


def test_parquet_with_lists_and_partitions_is_encoded_as_it_was_prepared(tmp_path):
    schema: dict[str, Any] = {"name": "x", "label": "y", "numeric": ["n"]}
    schema["categorical"] = ["u", "day"]
    schema["categorical"].append({"name": "tags", "multi_valued": True})
    frame = pl.DataFrame(
        {
            "y": [i % 2 for i in range(40)],
            "u": [float(i % 6) if i % 9 else None for i in range(40)],
            "n": [i - 3 for i in range(40)],
            "tags": [[str(j) for j in range(i % 3)] for i in range(40)],
        }
    )
    for day in (7, 10):
        for root, part in (("with", frame), ("without", frame.drop("y"))):
            folder = tmp_path / root / f"day={day}"
            folder.mkdir(parents=True)
            part.write_parquet(folder / "a.parquet")
    importer = TableImporter(schema=TableSchema.model_validate(schema))
    split = {"kind": "chronological", "train": 1.0, "valid": 0.0, "test": 0.0}
    info = prepare(tmp_path / "with", tmp_path / "out", importer=importer, split=split)
    wanted = joined(ParquetLoader(info, "train", batch_size=32, drop_last=False))
    for root in ("with", "without"):
        found = joined(encoder_of(info).batches(tmp_path / root, batch_size=7))
        wanted["labels"] = wanted["labels"] if root == "with" else torch.full((80,), math.nan)
        for key, value in wanted.items():
            assert torch.allclose(found[key], value, rtol=0, atol=0, equal_nan=True), key


def small(folder: Path, **schema) -> DatasetInfo:
    (folder / "raw.csv").write_text("y,u,n\n1,a,2\n0,b,5\n1,a,\n0,,1\n")
    document = {"name": "x", "label": "y", "categorical": ["u"], "numeric": ["n"]} | schema
    importer = TableImporter(schema=TableSchema.model_validate(document))
    split = {"kind": "chronological", "train": 1.0, "valid": 0.0, "test": 0.0}
    return prepare(folder / "raw.csv", folder / "out", importer=importer, split=split)


def test_unseen_values_are_one_missing_ones_zero_and_order_is_kept(tmp_path):
    info = small(tmp_path)
    new = tmp_path / "new.csv"
    new.write_text("n,other,u\n5,,zz\n,,b\n1,,\n")
    (batch,) = encoder_of(info).batches(new)
    assert batch.sparse["u"].values().tolist() == [1, 3, 0]
    assert batch.dense[:, 0].tolist() == pytest.approx([math.log(6), 0, math.log(2)])
    assert batch.rows.tolist() == [0, 1, 2]


def test_a_label_never_decides_whether_a_row_is_read(tmp_path):
    info = small(tmp_path)
    new = tmp_path / "new.csv"
    new.write_text("y,u,n\n7,a,1\n,a,1\nmaybe,b,1\n1,b,1\n")
    (batch,) = encoder_of(info).batches(new)
    assert batch.sparse["u"].values().tolist() == [2, 2, 3, 3]
    assert batch.labels.isnan().tolist() == [True, True, True, False]


def test_a_rating_that_training_leaves_out_is_read_without_a_label(tmp_path):
    written = write(CASES["movielens"], tmp_path)
    raw = written.unlabelled  # the users and movies are beside it
    raw.write_text("1::10::3::5\n2::11::5::6\n1::12::::7\n9::99::1::8\n")
    (batch,) = encoder_of(written.info).batches(raw)
    assert batch.labels.isnan().tolist() == [True, False, True, False]
    assert batch.sparse["movie"].values().tolist()[-1] == 1
    assert batch.sparse["gender"].values().tolist()[-1] == 0
    assert batch.sparse["genres"].lengths().tolist() == [2, 1, 0, 0]


def test_one_file_of_several_may_have_labels(tmp_path):
    written = write(CASES["avazu"], tmp_path)
    found = joined(encoder_of(written.info).batches([written.unlabelled, written.labelled], 16))
    assert found["labels"].isnan().tolist() == [True] * ROWS + [False] * ROWS
    assert torch.equal(found["C1"][:ROWS], found["C1"][ROWS:])


def test_malformed_rows_are_left_out_up_to_a_share_and_named_above_it(tmp_path):
    info = small(tmp_path)
    new = tmp_path / "new.csv"
    new.write_text("u,n\na,1\na,x\nb,2\na,inf\n")
    stream = encoder_of(info).open(new, max_bad_rows=0.5)
    (batch,) = encoder_of(info).cut(stream, 8)
    assert batch.rows.tolist() == [0, 2] and stream.bad == 2
    with pytest.raises(DataError, match=r"2 of 4 rows are malformed.*\n.*line 3: n is 'x'"):
        list(encoder_of(info).batches(new, max_bad_rows=0.49))


@pytest.mark.parametrize("rows", [1, 50, 51, 89, 90, 500])
def test_a_limit_ends_the_rows_where_it_says(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("embcomp.data_pipelines.importers.text.BLOCK_BYTES", 300)
    written = write(CASES["indices"], tmp_path)
    stream = encoder_of(written.info).open([written.labelled], rows=rows)
    found = joined(encoder_of(written.info).cut(stream, 16))
    assert len(found["labels"]) == min(rows, ROWS) == stream.total
    assert stream.blocks[-1].row < rows, "blocks behind the limit are not read"


def test_rows_in_memory_are_encoded_as_those_of_files(tmp_path):
    written = write(CASES["criteo"], tmp_path)
    rows_of = encoder_of(written.info)
    rows = criteo_rows(ROWS)
    names = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    columns = {name: [row[at] or None for row in rows] for at, name in enumerate(names)}
    for name in names[1:14]:
        columns[name] = [None if value is None else int(value) for value in columns[name]]
    found = joined([rows_of.encode(columns)])
    wanted = joined(rows_of.batches(written.unlabelled))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key].nan_to_num(9.0), value.nan_to_num(9.0)), key


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"u": ["a"]}, "column for feature 'n', which the batch lacks; it has u"),
        ({"u": ["a"], "n": [1, 2]}, "same number of rows, 1 or more, of each feature: n 2, u 1"),
        ({"u": [], "n": []}, "1 or more"),
        ({"u": ["a"], "n": ["x"]}, "'n': 'x' is no finite number"),
        ({"u": ["a"], "n": [math.inf]}, "no finite number"),
        ({"u": ["a", 3], "n": [1, 2]}, "'u': its values are not of one type"),
        ({"u": [["a"]], "n": [1]}, "'u': expected one value a row"),
        ({"u": [{"a": 1}], "n": [1]}, "no values of a category"),
    ],
)
def test_rows_in_memory_that_cannot_be_are_refused(columns, words, tmp_path):
    with pytest.raises(DataError, match=words):
        encoder_of(small(tmp_path)).encode(columns)


def test_another_format_that_lacks_a_feature_is_refused(tmp_path):
    info = small(tmp_path)
    (tmp_path / "other").mkdir()
    written = write(CASES["indices"], tmp_path / "other")
    with pytest.raises(DataError, match=r"log\.libfm gives no numeric feature 'n'"):
        RawEncoder(info, make_importer("libfm")).open(written.labelled)
    bags = small_bags()
    with pytest.raises(DataError, match="feature 'u' has one value a row in the dataset"):
        RawEncoder(info, bags).open(tmp_path / "raw.csv")


def small_bags() -> TableImporter:
    document: dict[str, Any] = {"name": "x", "label": "y", "numeric": ["n"]}
    document["categorical"] = [{"name": "u", "separator": "|"}]
    return TableImporter(schema=TableSchema.model_validate(document))


def test_a_dataset_that_does_not_say_how_it_was_read_asks_for_the_format(tmp_path):
    class Mine(TableImporter):
        name = "mine"

    schema = TableSchema.model_validate({"name": "x", "label": "y", "categorical": ["u"]})
    (tmp_path / "raw.csv").write_text("y,u\n1,a\n0,b\n")
    split = {"kind": "chronological", "train": 1.0, "valid": 0.0, "test": 0.0}
    mine = Mine(schema=schema)
    info = prepare(tmp_path / "raw.csv", tmp_path / "out", importer=mine, split=split)
    with pytest.raises(DataError, match="does not say how raw rows are written.*--format"):
        encoder_of(info).open(tmp_path / "raw.csv")
    (batch,) = RawEncoder(info, mine).batches(tmp_path / "raw.csv")
    assert batch.sparse["u"].values().tolist() == [2, 3]


@pytest.mark.parametrize(
    "change", [{"importer": "parquery"}, {"options": {}}, {"options": {"schema": {"name": 3}}}]
)
def test_a_description_of_rows_that_makes_no_sense_is_named(change, tmp_path):
    info = small(tmp_path)
    described = json.loads(info.raw_format.model_dump_json()) | change
    with pytest.raises(DataError, match=r"^x\.json: "):
        importer_of(type(info.raw_format).model_validate(described), "x.json")
