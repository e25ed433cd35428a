"""Any CSV, TSV or Parquet file that a schema YAML describes (see `table_schema`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
from pydantic import ValidationError
from typing_extensions import Self, override

from embcomp.data_pipelines.importers.base import (
    CategoricalColumn,
    Importer,
    Layout,
    NumericColumn,
    RawFile,
    RawTable,
    listed,
)
from embcomp.data_pipelines.importers.compressed import SUFFIXES
from embcomp.data_pipelines.importers.delimited import (
    ColumnType,
    Delimited,
    split_fields,
    without_absent,
)
from embcomp.data_pipelines.importers.parquet import ParquetTable
from embcomp.data_pipelines.importers.table_columns import (
    as_number,
    check_columns,
    check_types,
    common_shape,
    without,
)
from embcomp.data_pipelines.importers.table_schema import TableSchema, load_schema
from embcomp.data_pipelines.importers.text import Parsed, TextTable, read_head
from embcomp.data_pipelines.splits import SplitRule
from embcomp.errors import DataError

_LAKES = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}
_FORMATS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".pq": "parquet"}


@dataclass(frozen=True, kw_only=True)
class TableImporter(Importer):
    """Files described by a schema YAML."""

    name: ClassVar[str] = "table"
    title: ClassVar[str] = "CSV, TSV or Parquet files described by a schema YAML"
    rename: ClassVar[str] = "name it anew in the schema: {name: NEW, column: OLD}"
    schema: TableSchema

    @classmethod
    def from_yaml(cls, path: str | Path) -> TableImporter:
        """Read the schema from a file."""
        return cls(schema=load_schema(Path(path)))

    @property
    @override
    def default_min_count(self) -> int:
        return self.schema.min_count

    @property
    @override
    def default_split(self) -> SplitRule | None:
        return self.schema.split

    @override
    def find(self, folder: Path) -> list[Path]:
        found = [p for p in _files(folder) if _format(p) is not None]
        if self.schema.format is not None:
            found = [p for p in found if _format(p) == self.schema.format] or found
        if not found:
            raise DataError(
                f"{folder} holds no .csv, .tsv or .parquet file, nor partitions (sub-folders such as "
                f"day=7) that do"
            )
        return found

    @override
    def options(self, table: RawTable) -> dict[str, Any]:
        return {"schema": self.schema.model_dump(mode="json")}

    @override
    def weighted_by(self, column: str) -> TableImporter:
        content = {**self.schema.model_dump(), "weight": column}
        try:
            return replace(self, schema=TableSchema.model_validate(content))
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise DataError(f"weight {column!r}: {problem}") from None

    @classmethod
    @override
    def with_options(cls, options: Mapping[str, Any]) -> Self:
        return cls(schema=TableSchema.model_validate(options["schema"]))

    @override
    def open_to_score(self, files: Sequence[RawFile]) -> RawTable:
        # Rows are not split, so that their time is not asked for.
        return self._open(files, self.schema.model_copy(update={"split": None}), to_score=True)

    @override
    def open(self, files: Sequence[RawFile]) -> RawTable:
        return self._open(files, self.schema, to_score=False)

    def _open(self, files: Sequence[RawFile], schema: TableSchema, *, to_score: bool) -> RawTable:
        form = self.schema.format or _format(files[0].path)
        if form is None:
            raise DataError(
                f"cannot tell the format of {files[0].path} by its name; set `format` in the "
                f"schema to csv, tsv or parquet"
            )
        layout = Layout(
            numeric=tuple(
                NumericColumn(name=c.name, transform=c.transform) for c in schema.numeric
            ),
            categorical=tuple(
                CategoricalColumn(
                    name=c.name,
                    multi_valued=c.is_bag,
                    min_count=c.min_count,
                    hashed=c.encode == "hash",
                    holds_ids=c.encode == "ids",
                    num_embeddings=c.num_embeddings,
                )
                for c in schema.categorical
            ),
            group=schema.group,
            time=schema.time,
            weight=schema.weight,
        )
        if form == "parquet":
            return SchemaParquet(files, layout, schema, to_score=to_score)
        separator = "\t" if form == "tsv" else ","
        return SchemaText(files, layout, schema, separator, to_score=to_score)


class SchemaText(TextTable):
    """CSV or TSV rows; each file's own header says where its columns are."""

    def __init__(
        self,
        files: Sequence[RawFile],
        layout: Layout,
        schema: TableSchema,
        separator: str,
        *,
        to_score: bool = False,
    ) -> None:
        super().__init__(files, layout, header_lines=int(schema.columns is None))
        self.schema = schema
        self.separator = schema.separator or separator
        self.to_score = to_score
        self.formats = [self._format(file) for file in self.files]
        self.has_labels = self._has(schema.label.column)
        self.has_weights = schema.weight is not None and self._has(schema.weight)

    def _has(self, column: str) -> bool:
        """Whether some file has a column, or a folder above it says its value."""
        return any(
            column in each.schema or column in file.partitions
            for each, file in zip(self.formats, self.files)
        )

    def _format(self, file: RawFile) -> Delimited:
        names = list(self.schema.columns or ()) or self._header(file)
        check_columns(
            self.schema, [*names, *file.partitions], str(file.path), to_score=self.to_score
        )
        check_partitions(self.schema, file, names)
        kinds: dict[str, ColumnType] = dict.fromkeys(self.schema.number_sources, "float")
        if not self.schema.label.has_rule:
            kinds[self.schema.label.column] = "label"
        columns = [(name, kinds.get(name, "text")) for name in names]
        whole = Delimited(
            columns=tuple(columns),
            separator=self.separator,
            quote=self.schema.quote,
            null_values=self.schema.null_values,
            # A weight that is none is an error of the whole, and not of its line.
            lenient=() if self.schema.weight is None else (self.schema.weight,),
        )
        if not self.to_score:
            return whole
        label = self.schema.label.column
        if self.schema.columns is not None and label in names:
            return without_absent(whole, label, [file])[0]
        return replace(whole, lenient=(*whole.lenient, label))

    def _header(self, file: RawFile) -> list[str]:
        head = read_head(file.path, 1)
        if not head:
            raise DataError(f"{file.path} is empty; expected a header line")
        try:
            text = head[0].decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{file.path}, line 1: the header is not UTF-8") from None
        if "\r" in text:
            raise DataError(
                f"{file.path}, line 1: the header holds carriage returns, and lines end at "
                f"newlines; write the file with newlines"
            )
        names = split_fields(text, self.separator, self.schema.quote)
        if isinstance(names, str):
            raise DataError(f"{file.path}, line 1: {names}")
        double = sorted({name for name in names if names.count(name) > 1})
        if wrong := [name for name in double if name in self.schema.sources]:
            raise DataError(f"{file.path}, line 1: columns named twice: {wrong}")
        # Columns that nobody asks for may have any name, or none.
        return [f"{name}__{at}" if name in double else name for at, name in enumerate(names)]

    @override
    def parse(self, data: bytes, rows: int, file: int) -> Parsed:
        parsed = self.formats[file].parse(data, rows)
        frame = with_partitions(parsed.frame, self.files[file], self.schema)
        parsed.frame = common_shape(frame, self.schema)
        return parsed


class SchemaParquet(ParquetTable):
    """Parquet rows."""

    def __init__(
        self,
        files: Sequence[RawFile],
        layout: Layout,
        schema: TableSchema,
        *,
        to_score: bool = False,
    ) -> None:
        super().__init__(files, layout)
        self.schema = schema
        self.columns = schema.sources
        self.to_score = to_score
        self.has_labels = False
        for file in self.files:
            names = self.names(file)
            check_columns(schema, [*names, *file.partitions], str(file.path), to_score=to_score)
            self.has_labels |= schema.label.column in (*names, *file.partitions)
            self.has_weights |= schema.weight in (*names, *file.partitions)
            check_partitions(schema, file, names)
            types: dict[str, pl.DataType] = {
                name: pl.String() for name in schema.sources if name not in names
            }
            types |= self.types(file)
            types |= {n: pl.Float64() for n in schema.number_sources if n not in names}
            check_types(schema, types, str(file.path))

    @override
    def shape(self, frame: pl.DataFrame, file: int) -> pl.DataFrame:
        frame = with_partitions(frame, self.files[file], self.schema)
        return common_shape(without(frame, self.schema.null_values), self.schema)


def check_partitions(schema: TableSchema, file: RawFile, names: Sequence[str]) -> None:
    """Raise a DataError when a folder's name holds a word where the schema wants a number."""
    for name, value in file.partitions.items():
        wanted = name in schema.number_sources and name not in names
        if wanted and value is not None and as_number(pl.Series([value])).is_null().any():
            raise DataError(
                f"{file.path}: the folder {name}={value} holds no number, but the schema uses "
                f"{name!r} as one"
            )


def with_partitions(frame: pl.DataFrame, file: RawFile, schema: TableSchema) -> pl.DataFrame:
    """Add the columns that only the names of a file's folders hold, as text.

    The label of rows to score may be nowhere, and is null then.
    """
    absent = [name for name in schema.sources if name not in frame.columns]
    return frame.with_columns(
        pl.lit(file.partitions.get(name), dtype=pl.String).alias(name) for name in absent
    )


def _files(folder: Path) -> list[Path]:
    """Return a folder's files, and those of its partitions (`day=7`), in natural order."""
    found = listed(folder)
    for mark, kind in _LAKES.items():
        if (folder / mark).is_dir():
            raise DataError(
                f"{folder} is a {kind} table, of which some files are out of date; write its rows "
                f"as plain Parquet files and prepare those"
            )
    inside = [path for path in found if path.is_dir() and "=" in path.name]
    files = [path for path in found if path.is_file()]
    return sorted(files, key=lambda path: path.name) + [
        path for part in sorted(inside, key=_natural) for path in _files(part)
    ]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Order `hour=9` before `hour=10`."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _format(path: Path) -> str | None:
    suffixes = [s for s in path.suffixes if s not in SUFFIXES]
    return _FORMATS.get(suffixes[-1]) if suffixes else None
