"""Columns of a raw table, of any type, as the common shape that `importers.base` describes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import polars as pl

from embcomp.data_pipelines.importers.base import DROP, TIME, WEIGHT
from embcomp.data_pipelines.importers.canonical import (
    canonical_lists,
    canonical_text,
    has_canonical_text,
)
from embcomp.data_pipelines.importers.table_schema import CategoricalSchema, TableSchema
from embcomp.errors import DataError

_TRUTH = {"true": 1.0, "false": 0.0}
_ISO = ("%Y-%m-%d", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M")
_ISO_WITH_ZONE = ("%Y-%m-%d %H:%M:%S%.f%z", "%Y-%m-%dT%H:%M:%S%.f%z")


def common_shape(frame: pl.DataFrame, schema: TableSchema) -> pl.DataFrame:
    """Bring raw columns into the common shape."""
    label = frame.get_column(schema.label.column)
    values = pl.DataFrame({"text": canonical_text(label), "number": as_number(label)})
    columns = values.select(
        expression.alias(name)
        for expression, name in zip(
            schema.label.expressions(pl.col("text"), pl.col("number")), ("label", DROP)
        )
    ).get_columns()
    columns += [as_number(frame.get_column(c.source)).alias(c.name) for c in schema.numeric]
    columns += [_category(frame.get_column(c.source), c) for c in schema.categorical]
    if schema.time is not None:
        columns.append(as_time(frame.get_column(schema.time)).alias(TIME))
    if schema.weight is not None:
        columns.append(_number_or_nan(frame.get_column(schema.weight)).alias(WEIGHT))
    return pl.DataFrame(columns)


def without(frame: pl.DataFrame, null_values: Sequence[str]) -> pl.DataFrame:
    """Make null of the values whose text is one of those that a schema calls missing."""
    if not null_values:
        return frame
    marked = {
        column.name: canonical_text(column).is_in(null_values).fill_null(False)
        for column in frame.iter_columns()
        if has_canonical_text(column.dtype)
    }
    return frame.with_columns(
        pl.when(~pl.lit(mask)).then(pl.col(name)).alias(name) for name, mask in marked.items()
    )


def as_number(column: pl.Series) -> pl.Series:
    """Return Float64 values, null where they are missing or no numbers; True is 1."""
    return _number_or_nan(column).fill_nan(None)


def _number_or_nan(column: pl.Series) -> pl.Series:
    if column.dtype.base_type() not in (pl.String, pl.Categorical, pl.Enum, pl.Binary):
        if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
            return pl.Series(column.name, [None] * len(column), dtype=pl.Float64)
        return column.cast(pl.Float64)
    text = canonical_text(column)
    truth = text.str.to_lowercase().replace_strict(_TRUTH, default=None, return_dtype=pl.Float64)
    return text.cast(pl.Float64, strict=False).fill_null(truth)


def as_time(column: pl.Series) -> pl.Series:
    """Return Float64 that grow with time: numbers as they are, dates as microseconds."""
    kind = column.dtype
    if kind.is_numeric():
        return as_number(column)
    if isinstance(kind, pl.Datetime) or kind.is_(pl.Date):
        return column.cast(pl.Datetime("us")).to_physical().cast(pl.Float64)
    text = pl.col("text")
    bare = text.str.strip_suffix("Z")
    moments = [bare.str.strptime(pl.Datetime("us"), form, strict=False) for form in _ISO]
    moments += [
        text.str.strptime(pl.Datetime("us", "UTC"), form, strict=False).dt.replace_time_zone(None)
        for form in _ISO_WITH_ZONE
    ]
    texts = pl.DataFrame({"text": canonical_text(column), "number": as_number(column)})
    return texts.select(
        pl.coalesce("number", pl.coalesce(moments).to_physical().cast(pl.Float64)).alias(
            column.name
        )
    ).to_series()


def _category(column: pl.Series, feature: CategoricalSchema) -> pl.Series:
    if not feature.is_bag:
        return canonical_text(column).alias(feature.name)
    if not isinstance(column.dtype, pl.List | pl.Array):
        column = canonical_text(column).str.split(feature.separator or "")
    return canonical_lists(column).alias(feature.name)


def check_columns(
    schema: TableSchema, names: list[str], place: str, *, to_score: bool = False
) -> None:
    """Raise a DataError when the schema names a column that the data lacks.

    Args:
        to_score: whether label and weight may be absent.
    """
    optional = (schema.label.column, schema.weight) if to_score else ()
    wanted = [name for name in schema.sources if name not in optional]
    absent = [name for name in wanted if name not in names]
    if absent:
        near = difflib.get_close_matches(absent[0], names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(
            f"{place} has no column {absent[0]!r}{hint}; the schema wants {wanted}, the file has "
            f"{names}"
        )


def check_types(schema: TableSchema, types: dict[str, pl.DataType], place: str) -> None:
    """Raise a DataError when a column's type cannot be what the schema makes of it."""
    for name in schema.number_sources:
        kind = types[name]
        if not (kind.is_numeric() or kind in (pl.Boolean, pl.Null)):
            words = "; for words give `positive` and `negative` in the schema, such as '== yes'"
            raise DataError(
                f"{place}: column {name!r} holds {kind}, but the schema uses it as a number"
                f"{words if name == schema.label.column else ''}"
            )
    for column in schema.categorical:
        fault = _category_fault(column, types[column.source])
        if fault is not None:
            raise DataError(f"{place}: column {column.source!r} holds {fault}")
    if schema.time is not None and not _is_time(types[schema.time]):
        raise DataError(
            f"{place}: column {schema.time!r} holds {types[schema.time]}, and rows are split by "
            f"numbers, dates or timestamps"
        )


def _category_fault(column: CategoricalSchema, kind: pl.DataType) -> str | None:
    is_list = isinstance(kind, pl.List | pl.Array)
    if is_list and not column.is_bag:
        return "lists; set `multi_valued: true` for it in the schema"
    if is_list and not column.multi_valued:
        return (
            "lists, which have no separator; set `multi_valued: true` for it in the schema instead"
        )
    if not (is_list or kind.is_(pl.Null)) and column.multi_valued and column.separator is None:
        return f"{kind}, not lists; give a `separator` for it in the schema"
    if not has_canonical_text(kind.inner if isinstance(kind, pl.List | pl.Array) else kind):
        return f"{kind}, which is no category; turn its values into texts, numbers or lists of them"
    return None


def _is_time(kind: pl.DataType) -> bool:
    return kind.is_numeric() or kind.base_type() in (pl.Date, pl.Datetime, pl.String)
