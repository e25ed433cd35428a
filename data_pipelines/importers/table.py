"""Any CSV, TSV or Parquet file that a schema YAML describes (see `table_schema`)."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import polars as pl

from embcomp.data_pipelines.importers.base import (
    DROP,
    CategoricalColumn,
    Importer,
    Layout,
    NumericColumn,
    RawFile,
    RawTable,
)
from embcomp.data_pipelines.importers.delimited import ColumnType, Delimited
from embcomp.data_pipelines.importers.parquet import ParquetTable
from embcomp.data_pipelines.importers.table_schema import TableSchema, load_schema
from embcomp.data_pipelines.importers.text import Parsed, TextTable, read_head
from embcomp.data_pipelines.splits import SplitRule
from embcomp.errors import DataError

_FORMATS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".pq": "parquet"}


@dataclass(frozen=True, kw_only=True)
class TableImporter(Importer):
    """Files described by a schema YAML."""

    name: ClassVar[str] = "table"
    title: ClassVar[str] = "CSV, TSV or Parquet files described by a schema YAML"
    schema: TableSchema

    @classmethod
    def from_yaml(cls, path: str | Path) -> TableImporter:
        """Read the schema from a file."""
        return cls(schema=load_schema(Path(path)))

    @property
    def default_min_count(self) -> int:
        return self.schema.min_count

    @property
    def default_split(self) -> SplitRule | None:
        return self.schema.split

    def find(self, folder: Path) -> list[Path]:
        found = [p for p in super().find(folder) if _format(p) is not None]
        if self.schema.format is not None:
            found = [p for p in found if _format(p) == self.schema.format] or found
        if not found:
            raise DataError(f"{folder} holds no .csv, .tsv or .parquet file")
        return found

    def open(self, files: Sequence[RawFile]) -> RawTable:
        form = self.schema.format or _format(files[0].path)
        if form is None:
            raise DataError(
                f"cannot tell the format of {files[0].path} by its name; set `format` in the "
                f"schema to csv, tsv or parquet"
            )
        layout = Layout(
            numeric=tuple(
                NumericColumn(name=c.name, transform=c.transform) for c in self.schema.numeric
            ),
            categorical=tuple(
                CategoricalColumn(name=c.name, multi_valued=c.is_bag, min_count=c.min_count)
                for c in self.schema.categorical
            ),
            group=self.schema.group,
        )
        if form == "parquet":
            return SchemaParquet(files, layout, self.schema)
        return SchemaText(files, layout, self.schema, "\t" if form == "tsv" else ",")


class SchemaText(TextTable):
    """CSV or TSV rows."""

    def __init__(
        self, files: Sequence[RawFile], layout: Layout, schema: TableSchema, separator: str
    ) -> None:
        header = schema.columns is None
        super().__init__(files, layout, header_lines=int(header))
        self.schema = schema
        separator = schema.separator or separator
        names = list(schema.columns or ()) or self._header(files[0], separator)
        if header:
            for file in files[1:]:
                other = self._header(file, separator)
                if other != names:
                    raise DataError(
                        f"{file.path} has columns {other}, but {files[0].path} has {names}"
                    )
        check_columns(schema, names, str(files[0].path))
        numbers = {c.name for c in schema.numeric} | {schema.label.column}
        columns: list[tuple[str, ColumnType]] = [
            (name, "float" if name in numbers else "text") for name in names
        ]
        self.format = Delimited(
            columns=tuple(columns),
            separator=separator,
            quote=schema.quote,
            null_values=schema.null_values,
        )

    def _header(self, file: RawFile, separator: str) -> list[str]:
        head = read_head(file.path, 1)
        if not head:
            raise DataError(f"{file.path} is empty; expected a header line")
        try:
            text = head[0].decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"{file.path}, line 1: the header is not UTF-8") from None
        names = next(
            csv.reader(io.StringIO(text), delimiter=separator, quotechar=self.schema.quote), []
        )
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise DataError(f"{file.path}, line 1: columns named twice: {double}")
        return names

    def parse(self, data: bytes, rows: int) -> Parsed:
        parsed = self.format.parse(data, rows)
        parsed.frame = shape(parsed.frame, self.schema)
        return parsed


class SchemaParquet(ParquetTable):
    """Parquet rows."""

    def __init__(self, files: Sequence[RawFile], layout: Layout, schema: TableSchema) -> None:
        super().__init__(files, layout)
        self.schema = schema
        self.columns = list(dict.fromkeys([schema.label.column, *schema.feature_names]))
        for file in self.files:
            types = self.types(file)
            check_columns(schema, list(types), str(file.path))
            for name in {c.name for c in schema.numeric} | {schema.label.column}:
                if not (types[name].is_numeric() or types[name] == pl.Boolean):
                    raise DataError(
                        f"{file.path}: column {name!r} holds {types[name]}, but the schema uses "
                        f"it as a number"
                    )
            for column in schema.categorical:
                is_list = isinstance(types[column.name], pl.List)
                if is_list and not column.is_bag:
                    raise DataError(
                        f"{file.path}: column {column.name!r} holds lists; set `multi_valued: "
                        f"true` for it in the schema"
                    )
                if not is_list and column.multi_valued and column.separator is None:
                    raise DataError(
                        f"{file.path}: column {column.name!r} holds {types[column.name]}, not "
                        f"lists; give a `separator` for it in the schema"
                    )

    def shape(self, frame: pl.DataFrame) -> pl.DataFrame:
        return shape(frame, self.schema)


def shape(frame: pl.DataFrame, schema: TableSchema) -> pl.DataFrame:
    """Bring raw columns into the common shape that `importers.base` describes."""
    label, drop = schema.label.expressions()
    columns = [label.alias("label"), drop.alias(DROP)]
    for numeric in schema.numeric:
        columns.append(pl.col(numeric.name).cast(pl.Float64).fill_nan(None))
    for feature in schema.categorical:
        column = pl.col(feature.name)
        if feature.is_bag:
            if not isinstance(frame.schema[feature.name], pl.List):
                column = column.cast(pl.String).str.split(feature.separator or "")
            else:
                column = column.cast(pl.List(pl.String))
            column = column.list.eval(
                pl.element().filter(pl.element().is_not_null() & (pl.element() != ""))
            ).fill_null([])
        else:
            column = column.cast(pl.String)
            column = pl.when(column != "").then(column)
        columns.append(column.alias(feature.name))
    return frame.select(columns)


def check_columns(schema: TableSchema, names: list[str], place: str) -> None:
    """Raise a DataError when the schema names a column that the data lacks."""
    wanted = [schema.label.column, *schema.feature_names]
    absent = [name for name in wanted if name not in names]
    if absent:
        near = difflib.get_close_matches(absent[0], names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(
            f"{place} has no column {absent[0]!r}{hint}; the schema wants {wanted}, the file has "
            f"{names}"
        )


def _format(path: Path) -> str | None:
    suffixes = [s for s in path.suffixes if s != ".gz"]
    return _FORMATS.get(suffixes[-1]) if suffixes else None
