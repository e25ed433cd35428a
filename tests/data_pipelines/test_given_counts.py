"""Counts and ids that another engine made: ranked and checked here, traps refused by name."""

from __future__ import annotations

import random

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from embcomp.data_pipelines.frequencies import id_counts
from embcomp.data_pipelines.integrity import open_dataset
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing.row_encoder import RowEncoder
from embcomp.data_pipelines.validate import validate_dataset
from embcomp.errors import DataError
from tests.helpers.raw_logs import read_split, vocabulary
from tests.helpers.spark_folders import write_as_spark

SCHEMA = (
    "{name: shop, label: y, numeric: [price], categorical: [user, {name: tags, separator: '|'}]}"
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Raw rows as CSV, a schema, and the counts of the train split."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    rows = 600
    users = [f"{n:05d}d" if n % 3 else "" for n in rng.zipf(1.4, rows).clip(max=90)]
    tags = ["|".join(f"t{n}" for n in rng.integers(0, 12, k)) for k in rng.integers(0, 4, rows)]
    frame = pl.DataFrame(
        {"y": rng.integers(0, 2, rows), "price": rng.random(rows), "user": users, "tags": tags}
    )
    frame.write_csv(folder / "raw.csv")
    (folder / "shop.yaml").write_text(SCHEMA)
    info = prepare(folder / "raw.csv", folder / "own", **OPTIONS, schema=folder / "shop.yaml")
    counts = pl.concat(
        [
            vocabulary(info, name).select(pl.lit(name).alias("feature"), "value", "count")
            for name in ("user", "tags")
        ]
    )
    return folder, counts


OPTIONS = {"importer": "table", "name": "shop"}


def run(shop, out, **options):
    folder = shop[0]
    return prepare(folder / "raw.csv", out, **OPTIONS, schema=folder / "shop.yaml", **options)


def in_pieces(counts: pl.DataFrame, pieces: int) -> list[pl.DataFrame]:
    order = list(range(counts.height))
    random.Random(1).shuffle(order)
    shuffled = counts[order]
    return [shuffled[start::pieces] for start in range(pieces)]


def test_counts_in_any_order_of_rows_and_files_give_the_same_dataset(shop, tmp_path):
    own = open_dataset(shop[0] / "own")
    missing = pl.DataFrame({"feature": ["user"], "value": [None], "count": [44]}).cast(
        {"value": pl.String}
    )
    frames = in_pieces(pl.concat([shop[1], missing]), 4)
    folder = write_as_spark(tmp_path / "counts", [*frames, frames[0].clear()])
    info = run(shop, tmp_path / "out", vocabulary=folder)
    assert info.digest == own.digest
    for name in ("user", "tags"):
        assert vocabulary(info, name).equals(vocabulary(own, name))


def test_counts_in_a_folder_for_each_feature(shop, tmp_path):
    for name, rows in shop[1].partition_by("feature", as_dict=True).items():
        write_as_spark(
            tmp_path / "counts" / f"feature={name[0]}", in_pieces(rows.drop("feature"), 2)
        )
    info = run(shop, tmp_path / "out", vocabulary=tmp_path / "counts")
    assert info.digest == open_dataset(shop[0] / "own").digest


def test_counts_of_more_rows_keep_their_ranks(shop, tmp_path):
    """A value that today's rows lack has its id, and the rarest is cut by the least count."""
    more = pl.DataFrame({"feature": "user", "value": "new", "count": 10**12})
    rare = pl.DataFrame({"feature": "user", "value": "rare", "count": 1})
    frames = in_pieces(pl.concat([shop[1], more, rare]), 3)
    folder = write_as_spark(tmp_path / "counts", frames)
    info = run(shop, tmp_path / "out", vocabulary=folder, min_count={"user": 2, "tags": 1})
    found = vocabulary(info, "user")
    assert found.row(0) == (2, "new", 10**12)
    assert "rare" not in found["value"]
    assert found["count"].is_sorted(descending=True)
    assert validate_dataset(tmp_path / "out") is not None


def wrong(counts: pl.DataFrame, **changed) -> pl.DataFrame:
    kinds = {"count": pl.Int64} if isinstance(changed.get("count"), int) else {}
    return counts.with_columns(
        **{name: pl.lit(value, dtype=kinds.get(name)) for name, value in changed.items()}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: pl.concat([c, c[:1]]),
            "rows of the feature 'user' for .* values: some come more",
        ),
        (lambda c: pl.concat([c[1:], wrong(c[:1], count=-3)]), "a row has a count below 1: .*-3"),
        (lambda c: pl.concat([c[1:], wrong(c[:1], count=0)]), "a row has a count below 1"),
        (lambda c: wrong(c, count=1.5), "column 'count' holds double; expected whole numbers"),
        (lambda c: pl.concat([c, wrong(c[:1], feature="item")]), "'item' is none of the features"),
        (lambda c: c.filter(pl.col("feature") == "user"), "no row of the feature 'tags'"),
        (lambda c: c.rename({"count": "n"}), "has the columns feature, value, n; expected feature"),
        (
            lambda c: c.with_columns(pl.int_range(pl.len()).cast(pl.Float64).alias("value")),
            "column 'value' holds double; expected the text of the raw files.*inferSchema",
        ),
        (
            lambda c: c.with_columns(pl.col("value").str.strip_suffix("d") + ".0"),
            "none of the .* values of 'user' in the train split is kept.*inferSchema",
        ),
    ],
)
def test_counts_that_cannot_be_are_refused(shop, tmp_path, change, message):
    folder = write_as_spark(tmp_path / "counts", [change(shop[1])])
    with pytest.raises(DataError, match=message) as caught:
        run(shop, tmp_path / "out", vocabulary=folder)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["counts"]


def test_folders_that_are_none_of_counts_are_refused(shop, tmp_path):
    with pytest.raises(DataError, match="nothing is no folder"):
        run(shop, tmp_path / "out", vocabulary=tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "_SUCCESS").touch()
    with pytest.raises(DataError, match="holds no .parquet file"):
        run(shop, tmp_path / "out", vocabulary=tmp_path / "empty")
    folder = write_as_spark(tmp_path / "open", [shop[1]], succeeded=False)
    (folder / "_temporary").mkdir()
    with pytest.raises(DataError, match="is still being written"):
        run(shop, tmp_path / "out", vocabulary=folder)
    torn = write_as_spark(tmp_path / "torn", [shop[1]])
    path = next(torn.glob("part*"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is no whole Parquet file"):
        run(shop, tmp_path / "out", vocabulary=torn)


# ids that are there already


IDS = """
name: ids
label: y
categorical:
  - {name: user, encode: ids, num_embeddings: 50}
  - {name: tags, multi_valued: true, encode: ids, num_embeddings: 9}
"""


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Rows of ids in two part files whose integer types differ, and a schema."""
    folder = tmp_path_factory.mktemp("ids")
    rng = np.random.default_rng(3)
    user = [None if n == 13 else n for n in (rng.zipf(1.5, 400) % 40).tolist()]
    tags = [rng.integers(0, 9, k).tolist() for k in rng.integers(0, 4, 400)]
    frame = pl.DataFrame(
        {"y": rng.integers(0, 2, 400), "user": user, "tags": tags},
        schema={"y": pl.Int32, "user": pl.Int64, "tags": pl.List(pl.Int32)},
    )
    narrow = frame[:200].with_columns(pl.col("user").cast(pl.Int32))
    write_as_spark(folder / "rows", [_listed(narrow), _listed(frame[200:])])
    (folder / "ids.yaml").write_text(IDS)
    return folder, frame


def _listed(frame: pl.DataFrame) -> pa.Table:
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    fields = [
        pa.field(f.name, pa.list_(pa.int32()) if pa.types.is_large_list(f.type) else f.type)
        for f in table.schema
    ]
    return table.cast(pa.schema(fields))


def run_ids(encoded, out, **options):
    folder = encoded[0]
    options = {
        "importer": "table",
        "schema": folder / "ids.yaml",
        "split": "chronological",
    } | options
    return prepare(folder / "rows", out, **options)


def test_ids_stay_as_they_are(encoded, tmp_path):
    frame = encoded[1]
    info = run_ids(encoded, tmp_path / "out")
    rows = pl.concat([read_split(info, split) for split in ("train", "valid", "test")])
    assert rows["user"].to_list() == frame["user"].fill_null(0).to_list()
    assert rows["tags"].to_list() == frame["tags"].to_list()
    assert [f.num_embeddings for f in info.categorical] == [50, 9]
    train = frame[: info.split("train").rows]
    user = info.categorical[0]
    assert user.missing == int(frame["user"].fill_null(0).eq(0).sum())
    counted = np.bincount(train["user"].fill_null(0).to_numpy(), minlength=50)
    assert id_counts(info)["user"][2:].tolist() == counted[2:].tolist()
    carried = counted.cumsum() / counted.sum()
    assert user.frequency_quantiles["0.9"] == int(np.argmax(carried >= 0.9))
    validate_dataset(tmp_path / "out")


def test_memory_changes_no_byte_of_ids(encoded, tmp_path, monkeypatch):
    from embcomp.data_pipelines import prepare as module

    whole = run_ids(encoded, tmp_path / "whole", name="ids")
    monkeypatch.setattr(module, "_memory_budget", lambda limit: 20_000)
    small = run_ids(encoded, tmp_path / "small", name="ids")
    assert small.digest == whole.digest


def test_rows_to_score_take_their_ids_too(encoded, tmp_path):
    info = run_ids(encoded, tmp_path / "out")
    encoder = RowEncoder(info)
    feature = info.categorical[0]
    assert feature.encode == "ids"
    found = encoder._encoder._indices[0].ids(pl.Series(["7", None, "0", "49"]))
    assert found.tolist() == [7, 0, 0, 49]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([3, 50], "holds '50', which is no id of it; expected whole numbers from 0"),
        ([3, -1], "holds '-1', which is no id"),
        ([3.0, 3.5], "holds '3.5', which is no id"),
        (["3", "u7"], "holds 'u7', which is no id"),
    ],
)
def test_what_is_no_id_is_refused_with_its_file(tmp_path, values, message):
    frame = pl.DataFrame({"y": [0, 1] * 5, "user": values * 5})
    write_as_spark(tmp_path / "rows", [frame])
    (tmp_path / "ids.yaml").write_text(
        "{name: ids, label: y, categorical: [{name: user, encode: ids, num_embeddings: 50}]}"
    )
    with pytest.raises(DataError, match=f"part-00000.*{message}"):
        run_ids((tmp_path, frame), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_without_their_number_are_refused(shop, tmp_path):
    with pytest.raises(DataError, match="values of 'user' are said to be ids, but not how many"):
        run(shop, tmp_path / "out", encode="ids")
    (tmp_path / "s.yaml").write_text(
        "{name: s, label: y, categorical: [{name: user, encode: ids, num_embeddings: 9, min_count: 2}]}"
    )
    with pytest.raises(DataError, match="has a min_count, but its values are ids"):
        prepare(shop[0] / "raw.csv", tmp_path / "out", importer="table", schema=tmp_path / "s.yaml")


def test_a_vocabulary_of_ids_is_not_extended(encoded, tmp_path):
    run_ids(encoded, tmp_path / "day1")
    with pytest.raises(DataError, match="holds ids already"):
        run_ids(encoded, tmp_path / "day2", extend=tmp_path / "day1")
