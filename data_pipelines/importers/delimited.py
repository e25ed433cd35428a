"""Parse blocks of delimited text: fast when every line is sound, exact about lines that are not."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from embcomp.data_pipelines.importers.text import Parsed, split_lines
from embcomp.errors import DataError

ColumnType = Literal["int", "float", "text"]
_DTYPES: dict[str, type[pl.DataType]] = {"int": pl.Int64, "float": pl.Float64, "text": pl.String}
_NOUNS = {"int": "an integer", "float": "a number"}


@dataclass(frozen=True, kw_only=True)
class Delimited:
    """The columns of a delimited text and how they are written.

    The fast path hands the block to polars, which is enough when the block has exactly the
    separators that sound lines would have: polars refuses a line with too many fields, so no
    short line can hide behind a long one. Anything odd goes to the slow path, which finds the
    lines at fault one by one and parses the rest.
    """

    columns: tuple[tuple[str, ColumnType], ...]
    separator: str = ","
    quote: str | None = None
    null_values: tuple[str, ...] = ()

    @property
    def schema(self) -> dict[str, type[pl.DataType]]:
        return {name: _DTYPES[kind] for name, kind in self.columns}

    def parse(self, data: bytes, rows: int) -> Parsed:
        """Return the columns of every sound line, and the offsets and faults of the others."""
        separators = data.count(self.separator.encode())
        quoted = self.quote is not None and self.quote.encode() in data
        if quoted or separators == (len(self.columns) - 1) * rows:
            try:
                # Quotes may hide separators, so only the slow path can judge quoted lines.
                frame = None if quoted else self._read(data, self.schema)
            except (pl.exceptions.PolarsError, ValueError):
                frame = None
            if frame is not None and frame.height == rows and not self._has_blank(data):
                return Parsed(frame)
        return self._parse_slowly(data, rows)

    def _has_blank(self, data: bytes) -> bool:
        # A blank line is a sound row only of a single nullable column, which no table here has.
        return len(self.columns) == 1 and (data.startswith(b"\n") or b"\n\n" in data)

    def _read(self, data: bytes, schema: Mapping[str, type[pl.DataType]]) -> pl.DataFrame:
        return pl.read_csv(
            data,
            has_header=False,
            separator=self.separator,
            quote_char=self.quote,
            schema=schema,
            null_values=list(self.null_values) or None,
        )

    def _parse_slowly(self, data: bytes, rows: int) -> Parsed:
        lines = split_lines(data)
        bad: list[tuple[int, str]] = []
        sound: list[int] = []
        separator = self.separator.encode()
        ascii_only = data.isascii()
        for at, line in enumerate(lines):
            fault = None if ascii_only else _utf8_fault(line)
            if fault is None:
                fields = self._count(line, separator)
                if fields is None:
                    fault = "a quote is not closed or not escaped"
                elif fields != len(self.columns):
                    fault = f"expected {len(self.columns)} columns, got {fields}"
            if fault is None:
                sound.append(at)
            else:
                bad.append((at, fault))
        texts = dict.fromkeys(self.schema, pl.String)
        if not sound:
            return Parsed(
                pl.DataFrame(schema=self.schema), np.empty(0, dtype=np.int64), sorted(bad)
            )
        try:
            frame = self._read(b"\n".join(lines[at] for at in sound) + b"\n", texts)
        except pl.exceptions.PolarsError as error:
            raise DataError(f"rows that look sound cannot be parsed: {error}") from None
        if frame.height != len(sound):
            raise DataError(
                f"{len(sound)} lines were read as {frame.height} rows; quotes that span lines are "
                f"not supported"
            )
        positions = np.asarray(sound, dtype=np.int64)
        keep = np.ones(len(sound), dtype=bool)
        for name, kind in self.columns:
            if kind == "text":
                continue
            text = frame.get_column(name)
            # Leading blanks are what polars' own reader allows before a number.
            value = text.str.strip_chars_start(" ").cast(_DTYPES[kind], strict=False)
            wrong = (value.is_null() & text.is_not_null()).to_numpy()
            for at in np.flatnonzero(wrong & keep).tolist():
                bad.append((sound[at], f"{name} is {text[at]!r}, expected {_NOUNS[kind]}"))
            keep &= ~wrong
            frame = frame.with_columns(value.alias(name))
        if not keep.all():
            frame = frame.filter(pl.Series(keep))
            positions = positions[keep]
        whole = frame.height == rows
        return Parsed(frame, None if whole else positions, sorted(bad))

    def _count(self, line: bytes, separator: bytes) -> int | None:
        """Return how many fields a line has, or None when its quotes do not pair."""
        if self.quote is None or self.quote.encode() not in line:
            return line.count(separator) + 1
        reader = csv.reader(
            io.StringIO(line.decode()),
            delimiter=self.separator,
            quotechar=self.quote,
            strict=True,
        )
        try:
            parsed = list(reader)
        except csv.Error:
            return None
        return len(parsed[0]) if len(parsed) == 1 else None


def _utf8_fault(line: bytes) -> str | None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8"
    return None
