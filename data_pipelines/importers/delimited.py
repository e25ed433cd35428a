"""Parse blocks of delimited text: fast when every line is sound, exact about lines that are not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import polars as pl

from embcomp.data_pipelines.importers.base import RawFile
from embcomp.data_pipelines.importers.plain_lines import read_plain_lines
from embcomp.data_pipelines.importers.text import LineError, Parsed, read_head, split_lines
from embcomp.data_pipelines.numbering import Numbering

ColumnType = Literal["int", "whole", "float", "label", "text"]
"""`whole` numbers are written as `int`, and come as Float64."""
_DTYPES: dict[str, type[pl.DataType]] = {
    "int": pl.Int64,
    "whole": pl.Int64,
    "float": pl.Float64,
    "label": pl.Float64,
    "text": pl.String,
}
_NOUNS = {
    "int": "an integer",
    "whole": "an integer",
    "float": "a number",
    "label": "0 or 1, True or False, or a rule for words (positive: '== yes', negative: '!= yes')",
}
_TRUTH = {"true": 1.0, "false": 0.0}
_LONGEST_FIELD = 1000  # lines
_TRIED_ENDS = 20
_HEAD = 100  # lines that tell whether a file has labels
_OPEN = "a quote is not closed or not escaped"


@dataclass(frozen=True, kw_only=True)
class Delimited:
    """The columns of a delimited text and how they are written.

    Lines end at a newline, with or without a carriage return before it, and fields at the
    separator; nothing else cuts, and each line is judged by itself. The fast path hands the block
    to polars, which is enough when the block has exactly the separators that sound lines would
    have: polars refuses a line with too many fields, so no short line can hide behind a long one.
    Anything odd goes to the slow path, which reads the lines one by one.
    """

    columns: tuple[tuple[str, ColumnType], ...]
    separator: str = ","
    quote: str | None = None
    null_values: tuple[str, ...] = ()
    lenient: tuple[str, ...] = ()
    """Columns of numbers in which what is no number is missing, and no fault of its line."""

    def without(self, name: str) -> Delimited:
        """Return the same text without a column."""
        return replace(self, columns=tuple(c for c in self.columns if c[0] != name))

    def lacks_a_column(self, lines: Sequence[bytes], columns: int = 1) -> bool:
        """Whether most of some lines have exactly so many fields less than there are columns."""
        texts = [line.decode("utf-8", "replace") for line in lines]
        fields = [split_fields(text, self.separator, self.quote) for text in texts]
        short = [isinstance(f, list) and len(f) + columns == len(self.columns) for f in fields]
        return 2 * sum(short) > len(lines)

    @property
    def schema(self) -> dict[str, type[pl.DataType]]:
        """The type that each column is read as."""
        return {name: _DTYPES[kind] for name, kind in self.columns}

    def parse(
        self, data: bytes, rows: int, numberings: Mapping[str, Numbering] | None = None
    ) -> Parsed:
        """Return the columns of every sound line, and the offsets and faults of the others.

        Args:
            data: a block of whole lines.
            rows: how many lines it has.
            numberings: columns of texts that may come as their numbers instead.

        Raises:
            LineError: a quoted field spans lines, so that lines are not rows.
        """
        parsed = self._parse(data, rows, numberings or {})
        whole = [
            name
            for name, kind in self.columns
            if kind == "whole" and parsed.frame.schema[name] != pl.Float64
        ]
        if whole:
            parsed.frame = parsed.frame.with_columns(pl.col(whole).cast(pl.Float64))
        return parsed

    def _parse(self, data: bytes, rows: int, numberings: Mapping[str, Numbering]) -> Parsed:
        # Polars cuts a carriage return off any field, and a byte order mark off any block.
        odd_returns = b"\r" in data and data.count(b"\r") != data.count(b"\r\n")
        if odd_returns or data.startswith("\ufeff".encode()):
            return self._parse_slowly(data, rows)
        quoted = self.quote is not None and self.quote.encode() in data
        plain = None if quoted else self._read_plain(data, rows, numberings)
        if plain is not None:
            return Parsed(plain)
        if not quoted and self._is_plain(data, rows):
            frame = self._read(data, self.schema, rows)
            if frame is not None:
                return Parsed(frame)
            # Some number is none, or is True or False.
        elif not (quoted and self._is_soundly_quoted(data)):
            return self._parse_slowly(data, rows)
        frame = self._read(data, dict.fromkeys(self.schema, pl.String), rows, quoted=quoted)
        if frame is None:
            return self._parse_slowly(data, rows)
        return self._converted(frame, np.arange(rows), rows, [])

    def _read_plain(
        self, data: bytes, rows: int, numberings: Mapping[str, Numbering]
    ) -> pl.DataFrame | None:
        # Of a single column, a blank line is a row to some and nothing to others.
        if len(self.columns) == 1 or self.null_values:
            return None
        return read_plain_lines(data, rows, self.columns, self.separator, numberings)

    def _is_plain(self, data: bytes, rows: int) -> bool:
        if data.count(self.separator.encode()) != (len(self.columns) - 1) * rows:
            return False
        # A blank line is a sound row only of a single nullable column, which no table here has.
        return not (len(self.columns) == 1 and (data.startswith(b"\n") or b"\n\n" in data))

    def _is_soundly_quoted(self, data: bytes) -> bool:
        """Whether every line by itself has the right number of fields and pairs its quotes."""
        assert self.quote is not None
        q, s = re.escape(self.quote), re.escape(self.separator)
        field = f"(?:{q}[^{q}]*(?:{q}{q}[^{q}]*)*{q}|[^{q}{s}]*)"
        row = re.compile(f"{field}(?:{s}{field}){{{len(self.columns) - 1}}}".encode())
        return all(map(row.fullmatch, split_lines(data)))

    def _read(
        self,
        data: bytes,
        schema: Mapping[str, type[pl.DataType]],
        rows: int,
        *,
        quoted: bool = False,
    ) -> pl.DataFrame | None:
        try:
            frame = pl.read_csv(
                data,
                has_header=False,
                separator=self.separator,
                quote_char=self.quote if quoted else None,
                schema=schema,
                null_values=list(self.null_values) or None,
            )
        except (pl.exceptions.PolarsError, ValueError):
            return None
        return frame if frame.height == rows else None

    def _parse_slowly(self, data: bytes, rows: int) -> Parsed:
        bad: list[tuple[int, str]] = []
        sound: list[int] = []
        values: list[list[str]] = []
        lines = split_lines(data)
        for at, line in enumerate(lines):
            found = self._fields(line)
            if isinstance(found, str):
                if found == _OPEN:
                    self._check_span(lines, at)
                bad.append((at, found))
            else:
                sound.append(at)
                values.append(found)
        columns = list(zip(*values)) if values else [()] * len(self.columns)
        frame = pl.DataFrame(
            [
                pl.Series(name, column, dtype=pl.String)
                for (name, _), column in zip(self.columns, columns)
            ]
        )
        return self._converted(frame, np.asarray(sound, dtype=np.int64), rows, bad)

    def _converted(
        self, frame: pl.DataFrame, positions: np.ndarray, rows: int, bad: list[tuple[int, str]]
    ) -> Parsed:
        """Turn the texts of the rows at some positions into numbers where numbers are wanted."""
        missing = ["", *self.null_values]
        frame = frame.with_columns(pl.when(pl.all().is_in(missing).not_()).then(pl.all()))
        keep = np.ones(frame.height, dtype=bool)
        for name, kind in self.columns:
            if kind == "text":
                continue
            text = frame.get_column(name)
            value = text.to_frame().select(_number(name, kind)).to_series()
            # A blank number is a missing one, as in polars' own reader.
            given = text.str.strip_chars(" \t").fill_null("") != ""
            wrong = (value.is_null() & given & (name not in self.lenient)).to_numpy()
            for at in np.flatnonzero(wrong & keep).tolist():
                fault = f"{name} is {text[at]!r}, expected {_NOUNS[kind]}"
                bad.append((int(positions[at]), fault))
            keep &= ~wrong
            frame = frame.with_columns(value)
        if not keep.all():
            frame = frame.filter(pl.Series(keep))
            positions = positions[keep]
        whole = frame.height == rows
        return Parsed(frame, None if whole else positions, sorted(bad))

    def _fields(self, line: bytes) -> list[str] | str:
        """Return the fields of a line, or what is wrong with it."""
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8"
        fields = split_fields(text, self.separator, self.quote)
        if isinstance(fields, list) and len(fields) != len(self.columns):
            return f"expected {len(self.columns)} columns, got {len(fields)}"
        return fields

    def _check_span(self, lines: Sequence[bytes], at: int) -> None:
        """Raise when the quote that a line leaves open is closed by one of the next lines."""
        assert self.quote is not None
        quote = self.quote.encode()
        nearby = range(at + 1, min(len(lines), at + _LONGEST_FIELD))
        for end in [n for n in nearby if quote in lines[n]][:_TRIED_ENDS]:
            if isinstance(self._fields(b"\n".join(lines[at : end + 1])), list):
                raise LineError(
                    at,
                    f"a quoted field holds a newline (its row ends {end - at} lines further on), "
                    f"and lines are rows here: write the table without newlines in its fields, or "
                    f"as Parquet",
                )


def without_absent(whole: Delimited, label: str, files: Sequence[RawFile]) -> list[Delimited]:
    """Return the format of each of the files to score, some of which may lack the label's column.

    Args:
        whole: the format of lines with all columns, which names the label.
    """
    whole = replace(whole, lenient=(*whole.lenient, label))
    return [
        whole.without(label) if whole.lacks_a_column(read_head(file.path, _HEAD)) else whole
        for file in files
    ]


def split_fields(line: str, separator: str, quote: str | None) -> list[str] | str:
    """Return the fields of a line, or the fault of its quotes.

    A quoted field may hold separators, and quotes that are doubled.
    """
    if quote is None or quote not in line:
        return line.split(separator)
    q, s = re.escape(quote), re.escape(separator)
    field = re.compile(f"{q}((?:[^{q}]|{q}{q})*){q}(?={s}|\\Z)|([^{q}{s}]*)(?={s}|\\Z)", re.DOTALL)
    fields: list[str] = []
    at = 0
    while True:
        match = field.match(line, at)
        if match is None:
            if line.startswith(quote, at):
                return _OPEN
            return (
                "a quote stands within a field that is not quoted; when quotes are ordinary "
                "characters here, let the schema say `quote: null`"
            )
        quoted, bare = match.groups()
        fields.append(bare if quoted is None else quoted.replace(quote * 2, quote))
        if match.end() == len(line):
            return fields
        at = match.end() + 1


def _number(name: str, kind: ColumnType) -> pl.Expr:
    text = pl.col(name)
    # Leading blanks are what polars' own reader allows before a number.
    value = text.str.strip_chars_start(" \t").cast(_DTYPES[kind], strict=False)
    if kind in ("float", "label"):
        truth = text.str.to_lowercase().replace_strict(
            _TRUTH, default=None, return_dtype=pl.Float64
        )
        value = pl.coalesce(value, truth)
    return value.alias(name)
