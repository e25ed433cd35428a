from __future__ import annotations

import gzip
import json
import math
from collections import Counter

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from embcomp.data_pipelines import prepare as prepare_module, transforms
from embcomp.data_pipelines.importers import text
from embcomp.data_pipelines.importers.table import TableImporter
from embcomp.data_pipelines.importers.table_schema import TableSchema
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing import (
    encode_pass,
    encoding,
    passes,
    vocabulary as vocabulary_module,
)
from embcomp.data_pipelines.preparing.counting import RunWriter
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.splits import uniform
from embcomp.data_pipelines.transforms import NumericStats
from embcomp.data_pipelines.validate import validate_dataset
from tests.helpers.raw_logs import (
    CRITEO_COLUMNS,
    criteo_bytes,
    criteo_rows,
    decode,
    folder_bytes,
    read_split,
    vocabulary,
    write_criteo,
)

ALL_TRAIN = {"kind": "chronological", "train": 1.0, "valid": 0.0, "test": 0.0}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that small inputs have many."""
    monkeypatch.setattr(text, "BLOCK_BYTES", 4000)


def column(rows: list[list[str]], name: str) -> list[str]:
    return [row[CRITEO_COLUMNS.index(name)] for row in rows]


def test_ids_are_ranked_by_train_frequency_with_ties_by_value(tmp_path, small_blocks):
    rows = write_criteo(tmp_path / "train.txt", 400)
    info = prepare(
        tmp_path / "train.txt",
        tmp_path / "out",
        importer="criteo",
        min_count=3,
        split={"kind": "chronological", "train": 0.5, "valid": 0.25, "test": 0.25},
    )
    for name in ("C1", "C17"):
        counts = Counter(value for value in column(rows[:200], name) if value)
        ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        kept = [(value, count) for value, count in ranked if count >= 3]
        found = vocabulary(info, name)
        assert found.select("value", "count").rows() == kept
        assert found["id"].to_list() == list(range(2, len(kept) + 2))
        feature = next(f for f in info.categorical if f.name == name)
        assert feature.num_embeddings == len(kept) + 2
        assert feature.num_raw_values == len(counts)


def test_rows_keep_their_order_and_values_map_back(tmp_path, small_blocks):
    rows = write_criteo(tmp_path / "train.txt", 500)
    info = prepare(
        tmp_path / "train.txt",
        tmp_path / "out",
        importer="criteo",
        min_count=1,
        numeric="none",
        split={"kind": "chronological", "train": 0.8, "valid": 0.1, "test": 0.1},
        rows_per_group=64,
        blocks_per_part=3,
    )
    assert len(info.split("train").files) > 5
    at = 0
    for split in ("train", "valid", "test"):
        frame = read_split(info, split)
        raw = rows[at : at + frame.height]
        at += frame.height
        assert frame["I2"].to_list() == [float(row[2]) for row in raw]
        assert frame["label"].to_list() == [float(row[0]) for row in raw]
        seen = decode(info, "C3")
        for value, found in zip(column(raw, "C3"), frame["C3"].to_list()):
            assert found == 0 if value == "" else seen.get(found, "unseen") in (value, "unseen")
            assert (found == 1) == (value != "" and value not in seen.values())
    assert at == len(rows)
    assert validate_dataset(tmp_path / "out").model_dump() == info.model_dump()


def test_row_groups_have_the_asked_size_and_the_columns_their_types(tmp_path, small_blocks):
    write_criteo(tmp_path / "train.txt", 300)
    info = prepare(
        tmp_path / "train.txt",
        tmp_path / "out",
        importer="criteo",
        split=ALL_TRAIN,
        rows_per_group=70,
    )
    (name,) = info.split("train").files
    file = pq.ParquetFile(tmp_path / "out" / name)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [70, 70, 70, 70, 20]
    assert file.schema_arrow.names == CRITEO_COLUMNS
    assert [str(t) for t in file.schema_arrow.types] == ["float"] * 14 + ["int32"] * 26


@pytest.mark.slow
def test_neither_memory_nor_source_files_change_a_byte(tmp_path, small_blocks):
    rows = criteo_rows(600, values=300)
    (tmp_path / "a.txt").write_bytes(criteo_bytes(rows))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(criteo_bytes(rows)))
    outs = []
    for number, (file, memory) in enumerate(
        [("a.txt", "8GiB"), ("a.txt", 10**11), ("b.txt.gz", "8GB")]
    ):
        out = tmp_path / str(number) / "out"
        prepare(tmp_path / file, out, importer="criteo", min_count=2, max_memory=memory)
        found = folder_bytes(out)
        content = json.loads(found.pop("dataset.json"))
        content.pop("sources")
        outs.append((found, content))
    assert outs[0] == outs[1] == outs[2]


@pytest.mark.slow
def test_the_spilling_paths_give_the_same_bytes(tmp_path, small_blocks, monkeypatch):
    rows = criteo_rows(400, values=300)
    rows = [[*row[:14], f"only{i}", *row[15:]] for i, row in enumerate(rows)]
    (tmp_path / "train.txt").write_bytes(criteo_bytes(rows))
    options = {"importer": "criteo", "min_count": 1, "blocks_per_part": 6}
    prepare(tmp_path / "train.txt", tmp_path / "a" / "out", **options)
    runs, pieces, rounds = [], [], []
    flush, ranges, plan = RunWriter.flush, vocabulary_module.ranked_ranges, encoding.plan_rounds
    monkeypatch.setattr(RunWriter, "flush", lambda self: (flush(self), runs.append(self.files)))
    monkeypatch.setattr(
        vocabulary_module,
        "ranked_ranges",
        lambda f, r, p: (pieces.append((len(f), p)), ranges(f, r, p))[1],
    )
    monkeypatch.setattr(
        encode_pass, "plan_rounds", lambda s, r: (rounds.append(plan(s, r)), rounds[-1])[1]
    )
    # Values are counted, not numbered: `test_stored_rows` compares the two.
    monkeypatch.setattr(passes, "can_number", lambda: False)
    # So little room forces run files, hash partitions, sorting by ranges and rounds of encoding.
    monkeypatch.setattr(prepare_module, "_memory_budget", lambda size: 25_000)
    prepare(tmp_path / "train.txt", tmp_path / "b" / "out", **options)
    assert max(map(len, runs)) > 1
    assert max(files for files, _ in pieces) > 1
    assert max(count for _, count in pieces) > 1
    assert len(rounds[0]) > 1
    assert folder_bytes(tmp_path / "a" / "out") == folder_bytes(tmp_path / "b" / "out")


def test_random_split_follows_the_seed_and_the_shares(tmp_path):
    write_criteo(tmp_path / "train.txt", 3000)
    infos = [
        prepare(
            tmp_path / "train.txt",
            tmp_path / name,
            importer="criteo",
            numeric="none",
            split={"kind": "random", "seed": seed, "train": 0.6, "valid": 0.2, "test": 0.2},
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    rows = [read_split(info, "train")["I2"].to_list() for info in infos]
    assert rows[0] == rows[1] != rows[2]
    assert all(row == sorted(row) for row in rows)
    drawn = uniform(1, 0, 3000)
    assert rows[0] == np.flatnonzero(drawn < 0.6).tolist()
    assert len(rows[0]) / 3000 == pytest.approx(0.6, abs=0.03)
    every = [i for s in ("train", "valid", "test") for i in read_split(infos[0], s)["I2"].to_list()]
    assert sorted(every) == list(range(3000))


def test_given_files_are_the_splits(tmp_path):
    for name, seed in (("x", 0), ("y", 1), ("z", 2)):
        write_criteo(tmp_path / f"{name}.txt", 50 + seed, seed)
    info = prepare(
        {"test": tmp_path / "z.txt", "train": [tmp_path / "x.txt"], "valid": tmp_path / "y.txt"},
        tmp_path / "out",
        importer="criteo",
    )
    assert {name: split.rows for name, split in info.splits.items()} == {
        "train": 50,
        "valid": 51,
        "test": 52,
    }
    assert info.split_rule == {"kind": "files"}
    assert [source.path[-5:] for source in info.sources] == ["x.txt", "y.txt", "z.txt"]


def test_figures_of_dataset_json_agree_with_the_rows(tmp_path):
    rows = write_criteo(tmp_path / "train.txt", 700)
    info = prepare(tmp_path / "train.txt", tmp_path / "out", importer="criteo", min_count=2)
    assert DatasetInfo.load(tmp_path / "out").model_dump() == info.model_dump()
    for name, split in info.splits.items():
        frame = read_split(info, name)
        assert split.rows == frame.height
        assert split.positives == int(frame["label"].sum())
        assert split.unseen_rate["C1"] == pytest.approx((frame["C1"] == 1).mean())
    train = read_split(info, "train")
    for feature in info.categorical:
        assert feature.missing == sum(value == "" for value in column(rows, feature.name))
        for share, quantile in feature.frequency_quantiles.items():
            carried = [(train[feature.name] <= i).mean() for i in (quantile, quantile - 1)]
            assert carried[0] >= float(share) > carried[1]
    assert info.numeric[0].missing == sum(value == "" for value in column(rows, "I1"))
    assert info.sources[0].bytes == (tmp_path / "train.txt").stat().st_size


@pytest.mark.parametrize("transform", ["none", "log1p", "standard_log", "min_max"])
def test_numeric_transforms_follow_their_formula(tmp_path, transform):
    rows = write_criteo(tmp_path / "train.txt", 300)
    info = prepare(
        tmp_path / "train.txt",
        tmp_path / "out",
        importer="criteo",
        numeric=transform,
        split={"kind": "chronological", "train": 0.5, "valid": 0.25, "test": 0.25},
    )
    raw = np.array([float(v) if v else np.nan for v in column(rows, "I1")])
    train = raw[:150][~np.isnan(raw[:150])]
    logs = np.log1p(np.maximum(train, 0))
    wanted = {
        "none": raw,
        "log1p": np.log1p(np.maximum(raw, 0)),
        "standard_log": (np.log1p(np.maximum(raw, 0)) - logs.mean()) / logs.std(),
        "min_max": np.clip((raw - train.min()) / (train.max() - train.min()), 0, 1),
    }[transform]
    found = np.concatenate(
        [read_split(info, s)["I1"].to_numpy() for s in ("train", "valid", "test")]
    )
    np.testing.assert_allclose(found, np.nan_to_num(wanted), rtol=2e-6, atol=1e-6)
    assert (info.numeric[0].mean is not None) == (transform == "standard_log")


def test_figures_of_numeric_columns_are_independent_of_the_last_bits_of_libraries(monkeypatch):
    values = pl.Series(np.random.default_rng(0).lognormal(5, 3, 100_001))
    logs = np.array([math.log1p(value) for value in values])
    mean = math.fsum(logs) / len(logs)
    std = math.sqrt(math.fsum((logs - mean) ** 2) / len(logs))

    def figures():
        stats = NumericStats()
        stats.update(values)
        feature = stats.feature("x", "standard_log", 0)
        return feature.mean, feature.std

    found = figures()
    assert found == (float(f"{mean:.12g}"), float(f"{std:.12g}"))
    # Logarithms of another library, added in another order.
    monkeypatch.setattr(transforms, "pairwise_sum", lambda x: math.fsum(np.nextafter(x, np.inf)))
    assert figures() == found


def test_buckets_follow_the_rule_of_the_criteo_winners(tmp_path):
    rows = write_criteo(tmp_path / "train.txt", 400)
    info = prepare(
        tmp_path / "train.txt",
        tmp_path / "out",
        importer="criteo",
        numeric={"I1": "bucket"},
        min_count=1,
        split=ALL_TRAIN,
    )
    assert info.categorical_names[0] == "I1"
    assert "I1" not in info.numeric_names
    values = decode(info, "I1")
    for raw, found in zip(column(rows, "I1"), read_split(info, "train")["I1"].to_list()):
        if raw == "":
            assert found == 0
        elif int(raw) > 2:
            assert values[found] == str(math.floor(math.log(int(raw)) ** 2))
        else:
            assert values[found] == f"SP{raw}"


def test_bayes_figures_are_copied_when_the_rule_is_theirs(tmp_path):
    write_criteo(tmp_path / "train.txt", 100)
    rule = {"train": 0.8, "valid": 0.1, "test": 0.1, "kind": "chronological"}
    truth = {"bayes": {"auc": 0.81, "log_loss": 0.4}, "split_rule": rule}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    same = prepare(tmp_path / "train.txt", tmp_path / "a", importer="criteo", split="chronological")
    assert same.bayes is not None
    assert same.bayes.auc == 0.81
    other = prepare(tmp_path / "train.txt", tmp_path / "b", importer="criteo", split="random")
    assert other.bayes is None


def test_a_feature_without_any_value_gets_the_two_fixed_ids(tmp_path):
    rows = [[*row[:14], "", *row[15:]] for row in criteo_rows(50)]
    (tmp_path / "train.txt").write_bytes(criteo_bytes(rows))
    info = prepare(tmp_path / "train.txt", tmp_path / "out", importer="criteo", min_count=1)
    assert info.categorical[0].num_embeddings == 2
    assert read_split(info, "train")["C1"].unique().to_list() == [0]
    validate_dataset(tmp_path / "out")


VALUE = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters=',|"'), min_size=1, max_size=5
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 1), st.none() | VALUE, st.lists(VALUE, max_size=3)),
        min_size=1,
        max_size=40,
    ),
    min_count=st.integers(1, 3),
)
def test_any_text_survives_encoding_and_decoding(tmp_path_factory, rows, min_count):
    folder = tmp_path_factory.mktemp("any")
    lines = [f"{label},{one or ''},{'|'.join(bag)}\n" for label, one, bag in rows]
    (folder / "raw.csv").write_bytes(b"label,one,bag\n" + "".join(lines).encode())
    schema = TableSchema.model_validate(
        {"name": "any", "label": "label", "categorical": ["one", {"name": "bag", "separator": "|"}]}
    )
    info = prepare(
        folder / "raw.csv",
        folder / "out",
        importer=TableImporter(schema=schema),
        min_count=min_count,
        split=ALL_TRAIN,
    )
    validate_dataset(folder / "out")
    frame = read_split(info, "train")
    one, bag = decode(info, "one"), decode(info, "bag")
    counts = Counter(value for _, value, _ in rows if value is not None)
    in_bags = Counter(value for _, _, values in rows for value in values)
    assert frame.height == len(rows)
    for (_, value, values), (_, found, ids) in zip(rows, frame.rows()):
        assert (
            found == 0
            if value is None
            else one.get(found) == (value if counts[value] >= min_count else None)
        )
        assert [bag.get(i) for i in ids] == [
            value if in_bags[value] >= min_count else None for value in values
        ]
        assert all(i >= 1 for i in ids)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), first=st.integers(0, 2**40), cut=st.integers(0, 50))
def test_random_draws_do_not_depend_on_the_blocks(seed, first, cut):
    whole = uniform(seed, first, 50)
    pieces = np.concatenate([uniform(seed, first, cut), uniform(seed, first + cut, 50 - cut)])
    assert (whole == pieces).all()
    assert ((whole >= 0) & (whole < 1)).all()
