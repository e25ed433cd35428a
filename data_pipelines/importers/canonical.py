"""One text for a value, whatever the type of the column that brings it.

The same id is an integer in one Parquet file, a float in the next (pandas turns integers with gaps
into floats) and a decimal or a dictionary in a third. A value's text depends on the value alone:

- whole numbers of any numeric type are written without a point, other numbers in plain decimals;
- booleans are 1 and 0, as other writers store them;
- a timestamp at midnight is its date; zones are brought to UTC, trailing zeros are dropped;
- bytes are the text that they encode, or `0x` and hexadecimal digits when they are not UTF-8.

Null, NaN and the empty text are missing: null.
"""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import polars as pl
import pyarrow as pa
from polars.datatypes import DataTypeClass


def has_canonical_text(kind: pl.DataType | DataTypeClass) -> bool:
    """Tell whether values of a type can be categories; lists are judged by their elements."""
    return (
        kind.is_numeric()
        or kind.is_(pl.Boolean)
        or kind.is_(pl.Null)
        or kind.base_type() in (pl.String, pl.Categorical, pl.Enum, pl.Binary)
        or kind.base_type() in (pl.Date, pl.Datetime, pl.Time)
    )


def canonical_text(column: pl.Series) -> pl.Series:
    """Return the String form of a column, null where it is missing."""
    kind = column.dtype
    name = column.name
    if kind.is_integer() or kind.is_(pl.Boolean):
        number = column.cast(pl.Int8) if kind.is_(pl.Boolean) else column
        return number.cast(pl.String)
    if kind.is_float():
        return _floats(column)
    if kind.is_decimal():
        return _trimmed(column.cast(pl.String))
    if kind.base_type() in (pl.Datetime, pl.Time):
        return _moments(column)
    text = _decoded(column) if kind.is_(pl.Binary) else column.cast(pl.String)
    return text.to_frame().select(pl.when(pl.col(name) != "").then(pl.col(name))).to_series()


def canonical_lists(column: pl.Series) -> pl.Series:
    """Return a column of lists or arrays as List(String) without missing entries or rows."""
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    lengths = column.list.len().fill_null(0).to_numpy()
    texts = canonical_text(column.explode(empty_as_null=False, keep_nulls=False))
    kept = np.append(0, np.cumsum(texts.is_not_null().to_numpy()))
    ends = np.append(0, np.cumsum(lengths, dtype=np.int64))
    offsets = pa.array(kept[ends], pa.int64())
    values = texts.drop_nulls().to_arrow().cast(pa.large_string())
    # As a table: before 1.44 polars takes the texts of a bare array of lists unconverted, and panics later.
    lists = pl.from_arrow(pa.table({column.name: pa.LargeListArray.from_arrays(offsets, values)}))
    assert isinstance(lists, pl.DataFrame)
    return lists.to_series()


def _floats(column: pl.Series) -> pl.Series:
    if column.dtype.is_(pl.Float16):
        # The floor of a Float16 is itself in polars 2.
        column = column.cast(pl.Float32)
    x = pl.col(column.name)
    whole = pl.when(x == x.floor()).then(x.cast(pl.Float64).cast(pl.Int128, strict=False))
    text = column.to_frame().select(
        pl.coalesce(whole.cast(pl.String), x.fill_nan(None).cast(pl.String))
    )
    return _plain(text.to_series()).alias(column.name)


def _plain(numbers: pl.Series) -> pl.Series:
    """Write small numbers such as 1e-7 without an exponent, as decimals are written."""
    small = numbers.str.contains("e-", literal=True).fill_null(False)
    if not small.any():
        return numbers
    plain = [format(Decimal(text), "f") for text in numbers.filter(small)]
    return numbers.scatter(small.arg_true(), plain)


def _trimmed(numbers: pl.Series) -> pl.Series:
    """Drop the zeros, and then the point, that end a number with a point."""
    text = pl.col(numbers.name)
    short = text.str.strip_chars_end("0").str.strip_chars_end(".")
    return (
        numbers.to_frame()
        .select(pl.when(text.str.contains(".", literal=True)).then(short).otherwise(text))
        .to_series()
        .replace("-0", "0")
    )


def _moments(column: pl.Series) -> pl.Series:
    if isinstance(column.dtype, pl.Datetime):
        if column.dtype.time_zone is not None:
            column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        text = column.dt.to_string("%Y-%m-%d %H:%M:%S%.f")
    else:
        text = column.dt.to_string("%H:%M:%S%.f")
    text = _trimmed(text)
    return text.str.strip_suffix(" 00:00:00") if isinstance(column.dtype, pl.Datetime) else text


def _decoded(column: pl.Series) -> pl.Series:
    try:
        return column.cast(pl.String)
    except pl.exceptions.PolarsError:
        texts = [None if value is None else _decode(value) for value in column]
        return pl.Series(column.name, texts, dtype=pl.String)


def _decode(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return "0x" + value.hex()
