"""What a value is: one text for it in every column type, missing in every type, cut by nothing else."""

from __future__ import annotations

import datetime as dt
import math
from decimal import Decimal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from embcomp.data_pipelines.importers import parquet
from embcomp.data_pipelines.importers.canonical import canonical_lists, canonical_text
from embcomp.data_pipelines.importers.delimited import ColumnType, Delimited
from embcomp.data_pipelines.importers.table import TableImporter
from embcomp.data_pipelines.importers.table_schema import TableSchema
from embcomp.data_pipelines.importers.text import LineError
from embcomp.data_pipelines.prepare import prepare
from embcomp.errors import DataError
from tests.helpers.raw_logs import decode, read_split

ALL_TRAIN = {"kind": "chronological", "train": 1.0, "valid": 0.0, "test": 0.0}


def table(**schema) -> TableImporter:
    return TableImporter(schema=TableSchema.model_validate({"name": "x", "label": "y"} | schema))


def prepared(folder, columns: dict[str, object], **schema):
    """A dataset, all train, of one Parquet file with these columns beside a label."""
    rows = len(next(iter(columns.values())))  # type: ignore[arg-type]
    whole = pa.table({"y": pa.array([i % 2 for i in range(rows)]), **columns})
    pq.write_table(whole, folder / "raw.parquet")
    return prepare(
        folder / "raw.parquet", folder / "out", importer=table(**schema), split=ALL_TRAIN
    )


THREES = {
    "int8": pa.array([3, 10, None], pa.int8()),
    "uint64": pa.array([3, 10, None], pa.uint64()),
    "float16": pa.array(np.array([3, 10, math.nan], np.float16)),
    "float32": pa.array([3.0, 10.0, math.nan], pa.float32()),
    "float64": pa.array([3.0, 10.0, None]),
    "decimal": pa.array([Decimal("3.00"), Decimal("10.00"), None], pa.decimal128(9, 2)),
    "whole decimal": pa.array([Decimal(3), Decimal(10), None], pa.decimal128(9, 0)),
    "dictionary of ints": pa.array([3, 10, None]).dictionary_encode(),
    "dictionary of floats": pa.array([3.0, 10.0, math.nan]).dictionary_encode(),
    "string": pa.array(["3", "10", ""]),
    "large string": pa.array(["3", "10", None], pa.large_string()),
    "dictionary of strings": pa.array(["3", "10", ""]).dictionary_encode(),
    "binary": pa.array([b"3", b"10", b""]),
}


@pytest.mark.parametrize("train", THREES)
def test_an_id_is_the_same_in_every_type_and_missing_is_missing(tmp_path, train):
    files = {}
    for at, (name, column) in enumerate(THREES.items()):
        files[name] = tmp_path / f"{at}.parquet"
        pq.write_table(pa.table({"y": [0, 1, 1], "item": column}), files[name])
    info = prepare(
        {"train": files[train], "test": list(files.values())},
        tmp_path / "out",
        importer=table(categorical=["item"]),
    )
    assert decode(info, "item") == {2: "10", 3: "3"}
    assert read_split(info, "test")["item"].to_list() == [3, 2, 0] * len(THREES)
    assert info.split("test").unseen_rate == {"item": 0.0}
    assert info.categorical[0].missing == 1 + len(THREES)


def test_fractions_are_the_same_in_floats_and_decimals():
    texts = ["0.1", "-1.5", "0.0000001", "123456.789"]
    floats = pl.Series([float(text) for text in texts])
    decimals = pl.Series([Decimal(text) for text in texts], dtype=pl.Decimal(30, 12))
    assert canonical_text(floats).to_list() == canonical_text(decimals).to_list() == texts
    assert canonical_text(pl.Series([-0.0, 1e20, 2.0**62])).to_list() == [
        "0",
        "1" + 20 * "0",
        str(2**62),
    ]


def test_booleans_are_one_and_zero_as_other_writers_store_them():
    assert canonical_text(pl.Series([True, None, False])).to_list() == ["1", None, "0"]


MOMENTS = [dt.datetime(2030, 1, 10), dt.datetime(2030, 1, 10, 8, 0, 0, 500000), None]
TEXTS = ["2030-01-10", "2030-01-10 08:00:00.5", None]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_a_timestamp_is_one_text_in_every_unit_and_zone(unit):
    naive = pl.Series(MOMENTS, dtype=pl.Datetime(unit))
    assert canonical_text(naive).to_list() == TEXTS
    zoned = naive.dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo")
    assert canonical_text(zoned).to_list() == TEXTS


def test_a_date_is_the_timestamp_of_its_midnight():
    assert canonical_text(pl.Series([dt.date(2030, 1, 10)])).to_list() == TEXTS[:1]
    assert canonical_text(pl.Series([dt.time(8), dt.time(8, 0, 0, 250000)])).to_list() == [
        "08:00:00",
        "08:00:00.25",
    ]


def test_bytes_that_are_no_text_do_not_change_those_that_are():
    assert canonical_text(pl.Series([b"a", b"\xff\x00", b""])).to_list() == ["a", "0xff00", None]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.none() | st.lists(st.none() | st.sampled_from([1.0, 2.5, math.nan]), max_size=3))
)
def test_lists_keep_their_values_in_order_and_lose_what_is_missing(bags):
    found = canonical_lists(pl.Series(bags, dtype=pl.List(pl.Float64))).to_list()
    text = {1.0: "1", 2.5: "2.5"}
    assert found == [[text[v] for v in bag or [] if v in text] for bag in bags]


def test_lists_of_a_fixed_size_are_bags(tmp_path):
    pairs = pa.array([["a", "b"], None, ["b", None]], pa.list_(pa.string(), 2))
    try:
        pq.write_table(pa.table({"tags": pairs}), tmp_path / "probe.parquet")
    except (
        pa.ArrowNotImplementedError
    ) as error:  # pyarrow 19 writes no missing list of a fixed size
        pytest.skip(str(error))
    info = prepared(tmp_path, {"tags": pairs}, categorical=[{"name": "tags", "multi_valued": True}])
    values = decode(info, "tags")
    bags = read_split(info, "train")["tags"].to_list()
    assert [[values[i] for i in bag] for bag in bags] == [["a", "b"], [], ["b"]]


@pytest.mark.parametrize("separator", [None, ","])
def test_lists_say_how_a_schema_takes_them(tmp_path, separator):
    pairs = pa.array([["a", "b"]], pa.list_(pa.string(), 2))
    with pytest.raises(DataError, match="'tags' holds lists.* set `multi_valued: true`"):
        prepared(tmp_path, {"tags": pairs}, categorical=[{"name": "tags", "separator": separator}])


@pytest.mark.parametrize(
    "column",
    [
        pa.array([{"a": 1}]),
        pa.array([[[1]]]),
        pa.array([1], pa.duration("s")),
        pa.array([Decimal("1.5")], pa.decimal256(50, 2)),
    ],
    ids=lambda column: str(column.type),
)
def test_a_type_that_is_no_category_is_named(tmp_path, column):
    with pytest.raises(DataError, match=r"raw\.parquet: column 'item' holds"):
        prepared(tmp_path, {"item": column}, categorical=[{"name": "item", "multi_valued": True}])
    # One that nobody asks for is none of our business.
    other = pa.array(["u"])
    assert prepared(tmp_path, {"item": column, "u": other}, categorical=["u"]).raw_rows == 1


def test_columns_without_any_value_are_missing_values(tmp_path):
    empty = {name: pa.nulls(4) for name in ("price", "item", "tags")}
    info = prepared(
        tmp_path,
        empty,
        numeric=["price"],
        categorical=["item", {"name": "tags", "multi_valued": True}],
    )
    assert info.numeric[0].missing == 4
    assert [feature.missing for feature in info.categorical] == [4, 4]


def test_a_csv_column_without_any_value_is_missing_values(tmp_path):
    (tmp_path / "raw.csv").write_text('y,price,item\n1,,\n0,"",""\n1,,\n')
    info = prepare(
        tmp_path / "raw.csv",
        tmp_path / "out",
        importer=table(numeric=["price"], categorical=["item"]),
        split=ALL_TRAIN,
    )
    assert (info.numeric[0].missing, info.categorical[0].missing) == (3, 3)


def test_ragged_batches_of_dictionaries_keep_their_rows(tmp_path, monkeypatch):
    sizes = (1, 5, 0, 2, 3)
    batches = [pa.record_batch({"a": pa.array(range(n), pa.int64())}) for n in sizes]
    cut = list(parquet._of_size(batches, 4))
    assert [piece.num_rows for piece in cut] == [4, 4, 3]
    monkeypatch.setattr(parquet, "BLOCK_ROWS", 7)
    items = [str(i % 50) for i in range(100)]
    info = prepared(tmp_path, {"item": pa.array(items).dictionary_encode()}, categorical=["item"])
    values = decode(info, "item")
    assert [values[i] for i in read_split(info, "train")["item"]] == items


BREAKS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r", "\ufeff"]
PIECES = [*BREAKS, "a", "1", "True", " ", "\t", ".", "-", "nan", "NA", '"', '""']
FIELD = st.lists(st.sampled_from(PIECES), max_size=3).map("".join)
LINE = st.tuples(FIELD, FIELD, FIELD, FIELD).map(",".join) | FIELD
COLUMNS: tuple[tuple[str, ColumnType], ...] = (
    ("number", "float"),
    ("word", "text"),
    ("count", "int"),
    ("last", "text"),
)
FORMATS = {
    "bare": Delimited(columns=COLUMNS, null_values=("NA",)),
    "quoted": Delimited(columns=COLUMNS, null_values=("NA",), quote='"'),
}


def by_line(form: Delimited, lines: list[str]) -> dict[int, str]:
    """What each line says: its values, or what is wrong with it."""
    parsed = form.parse("".join(f"{line}\n" for line in lines).encode(), len(lines))
    positions = range(len(lines)) if parsed.positions is None else parsed.positions.tolist()
    good = {at: repr(row) for at, row in zip(positions, parsed.frame.rows())}
    return good | dict(parsed.bad)


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=120, deadline=None)
@given(lines=st.lists(LINE, min_size=1, max_size=5))
def test_what_a_line_says_does_not_depend_on_the_lines_beside_it(form, lines):
    alone = [by_line(FORMATS[form], [line])[0] for line in lines]
    try:
        together = by_line(FORMATS[form], lines)
        between = by_line(FORMATS[form], [x for line in lines for x in ("1,a,2,b", line)])
    except LineError:
        assert form == "quoted"  # a field that spans lines ends everything
        return
    assert alone == [together[at] for at in range(len(lines))]
    assert alone == [between[2 * at + 1] for at in range(len(lines))]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=5))
def test_values_that_are_quoted_come_back_as_they_were(rows):
    lines = [",".join(f'"{field.replace(chr(34), chr(34) * 2)}"' for field in row) for row in rows]
    form = Delimited(columns=(("a", "text"), ("b", "text")), quote='"')
    parsed = form.parse("".join(f"{line}\n" for line in lines).encode(), len(lines))
    assert parsed.frame.rows() == [tuple(field or None for field in row) for row in rows]


@pytest.mark.parametrize("mark", BREAKS)
@pytest.mark.parametrize("importer", ["csv", "quoted csv", "libfm", "movielens"])
def test_nothing_but_a_newline_ends_a_line(tmp_path, importer, mark):
    value = f"a{mark}b"
    if importer.endswith("csv"):
        text = f'"{value}"' if importer == "quoted csv" else value
        (tmp_path / "raw.csv").write_bytes(f"y,item,z\n1,{text},\n0,c,\n".encode())
        info = prepare(
            tmp_path / "raw.csv",
            tmp_path / "out",
            importer=table(categorical=["item"]),
            split=ALL_TRAIN,
        )
        assert set(decode(info, "item").values()) == {value, "c"}
    elif importer == "libfm":
        (tmp_path / "raw").write_bytes(f"1 item:{value}\n0 item:c\n".encode())
        info = prepare(tmp_path / "raw", tmp_path / "out", importer="libfm", split=ALL_TRAIN)
        assert set(decode(info, "item").values()) == {value, "c"}
    else:
        code = value.encode().decode("latin-1")
        (tmp_path / "ratings.dat").write_text("1::10::5::978300760\n")
        (tmp_path / "users.dat").write_text("1::F::1::10::48067\n")
        (tmp_path / "movies.dat").write_bytes(f"10::X (1995)::{value}\n".encode())
        info = prepare(tmp_path, tmp_path / "out", importer="movielens", split=ALL_TRAIN)
        assert set(decode(info, "genres").values()) == {code}
