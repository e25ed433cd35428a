"""libFM, libSVM and libFFM text: `label token token ...`, a row per line.

The forms, told apart by the first lines unless the caller says:

- `indices` (`1 451:1 4149:1 5041:1`): each row has the same number of tokens, the k-th token is
  field k and its index the category. This is how libFM files of Frappe or MovieLens are written;
- `bag` (the same tokens, a varying number of them): one multi-valued feature `index`;
- `pairs` (`1 user:17 movie:99`): field name and category;
- `ffm` (`1 0:451:1 1:4149:1`): field, category and the weight 1.

A weight other than 1 is malformed: categories have no weights here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import polars as pl

from embcomp.data_pipelines.importers.base import CategoricalColumn, Importer, Layout, RawFile
from embcomp.data_pipelines.importers.text import Parsed, TextTable, read_head, split_lines
from embcomp.errors import DataError

Form = Literal["auto", "indices", "bag", "pairs", "ffm"]
_SAMPLE_LINES = 10_000
_ONE = r":1(\.0*)?$"
_LABELS = {"1": 1.0, "1.0": 1.0, "+1": 1.0, "0": 0.0, "0.0": 0.0, "-1": 0.0, "-1.0": 0.0}


@dataclass(frozen=True, kw_only=True)
class LibFMImporter(Importer):
    """libFM, libSVM or libFFM lines; labels -1 and 0 both mean 0."""

    name: ClassVar[str] = "libfm"
    title: ClassVar[str] = "libFM text: label index:1 ..., label field:value ... or libFFM"
    form: Form = "auto"

    def open(self, files: Sequence[RawFile]) -> TextTable:
        sample = [
            line.decode("utf-8", "replace").split()[1:]
            for file in files
            for line in read_head(file.path, _SAMPLE_LINES)
        ]
        sample = [tokens for tokens in sample if tokens]
        if not sample:
            raise DataError(f"{files[0].path} is empty; expected {self.title}")
        form = _guess(sample) if self.form == "auto" else self.form
        if form == "indices":
            return IndexTable(files, fields=len(sample[0]))
        return PairTable(files, form=form, sample=sample)


def _guess(sample: list[list[str]]) -> Form:
    tokens = [token for row in sample for token in row]
    colons = {token.count(":") for token in tokens}
    if colons == {2}:
        return "ffm"
    if colons == {1}:
        values = {token.rpartition(":")[2] for token in tokens}
        if not values <= {"1", "1.0"}:
            return "pairs"
        lengths = [len(row) for row in sample]
        # One malformed line must not turn fields into a bag.
        common = max(set(lengths), key=lengths.count)
        return "indices" if lengths.count(common) >= 0.99 * len(lengths) else "bag"
    raise DataError(
        f"tokens such as {tokens[0]!r} are neither index:1, field:value nor field:index:1; "
        f"found {sorted(colons)} colons per token"
    )


class _Lines(TextTable):
    """The split of a line into label and tokens, which all forms share."""

    def tokens(self, data: bytes) -> tuple[pl.DataFrame, list[tuple[int, str]]]:
        """Return columns row (offset), label, tokens (list of strings), and the bad rows."""
        bad: list[tuple[int, str]] = []
        lines = split_lines(data)
        texts: list[str | None] = []
        for at, line in enumerate(lines):
            try:
                texts.append(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                texts.append(None)
                bad.append((at, f"byte {error.start + 1} is not UTF-8"))
        parts = pl.Series("tokens", texts, dtype=pl.String).str.strip_chars().str.split(" ")
        frame = (
            pl.DataFrame({"tokens": parts})
            .with_row_index("row")
            .drop_nulls("tokens")
            .select(
                pl.col("row").cast(pl.Int64),
                pl.col("tokens")
                .list.first()
                .replace_strict(_LABELS, default=None, return_dtype=pl.Float32)
                .alias("label"),
                pl.col("tokens").list.slice(1).list.eval(pl.element().filter(pl.element() != "")),
            )
        )
        return frame, bad


class IndexTable(_Lines):
    """Rows of a fixed number of `index:1` tokens: field k is the k-th of them."""

    def __init__(self, files: Sequence[RawFile], *, fields: int) -> None:
        names = [f"field_{k}" for k in range(fields)]
        super().__init__(
            files, Layout(categorical=tuple(CategoricalColumn(name=name) for name in names))
        )

    def parse(self, data: bytes, rows: int) -> Parsed:
        frame, bad = self.tokens(data)
        names = self.layout.names
        count = pl.col("tokens").list.len()
        checked = frame.with_columns(
            (count != len(names)).alias("length"),
            pl.col("tokens").list.eval(pl.element().str.contains(r"^[^:]+" + _ONE)).list.all(),
            pl.col("tokens").alias("raw"),
        ).with_columns((pl.col("length") | pl.col("tokens").not_()).alias("wrong"))
        for row in checked.filter("wrong").iter_rows(named=True):
            length = len(row["raw"])
            reason = f"expected {len(names)} tokens after the label, got {length}"
            bad.append((row["row"], reason if row["length"] else "a token is not index:1"))
        good = checked.filter(~pl.col("wrong"))
        columns = [
            pl.col("raw").list.get(k, null_on_oob=True).str.replace(_ONE, "").alias(name)
            for k, name in enumerate(names)
        ]
        return _parsed(good.select("row", "label", *columns), rows, bad)


class PairTable(_Lines):
    """Rows of tokens that name their field, in any number and order."""

    def __init__(self, files: Sequence[RawFile], *, form: Form, sample: list[list[str]]) -> None:
        self.form = form
        repeated: dict[str, bool] = {}
        for row in sample:
            names = [self._field(token) for token in row]
            for name in names:
                repeated[name] = repeated.get(name, False) or names.count(name) > 1
        order = sorted(repeated, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n))
        self.fields = order
        prefix = "field_" if all(name.isdigit() for name in order) else ""
        super().__init__(
            files,
            Layout(
                categorical=tuple(
                    CategoricalColumn(
                        name=prefix + name, multi_valued=repeated[name] or form == "bag"
                    )
                    for name in order
                )
            ),
        )

    def _field(self, token: str) -> str:
        return "index" if self.form == "bag" else token.partition(":")[0]

    def parse(self, data: bytes, rows: int) -> Parsed:
        frame, bad = self.tokens(data)
        pattern = {
            "pairs": r"^([^:]+):(.+)$",
            "ffm": r"^([^:]+):([^:]+)" + _ONE,
            "bag": r"^()([^:]+)" + _ONE,
        }[self.form]
        pairs = (
            frame.select("row", "tokens")
            .explode("tokens", empty_as_null=True, keep_nulls=True)
            .drop_nulls("tokens")
            .with_columns(pl.col("tokens").str.extract_groups(pattern).alias("parts"))
            .select(
                "row",
                "tokens",
                (
                    pl.lit("index") if self.form == "bag" else pl.col("parts").struct.field("1")
                ).alias("field"),
                pl.col("parts").struct.field("2").alias("value"),
            )
        )
        single = [
            name
            for name, column in zip(self.fields, self.layout.categorical)
            if not column.multi_valued
        ]
        unread = pl.col("value").is_null() | pl.col("field").is_in(self.fields).not_()
        twice = pl.struct("row", "field").is_duplicated() & pl.col("field").is_in(single)
        for wrong, reason in ((unread, "cannot be read"), (twice, "repeats its field")):
            found = pairs.filter(wrong).unique("row", keep="first", maintain_order=True)
            bad += [
                (row, f"token {token!r} {reason}")
                for row, token in found.select("row", "tokens").iter_rows()
            ]
            left_out = pl.col("row").is_in(found.get_column("row").implode())
            pairs, frame = pairs.filter(~left_out), frame.filter(~left_out)
        frame = frame.select("row", "label")
        for name, column in zip(self.fields, self.layout.categorical):
            of_field = pairs.filter(pl.col("field") == name)
            if column.multi_valued:
                of_field = of_field.group_by("row", maintain_order=True).agg("value")
            frame = frame.join(
                of_field.select("row", pl.col("value").alias(column.name)),
                on="row",
                how="left",
                maintain_order="left",
            )
            if column.multi_valued:
                frame = frame.with_columns(pl.col(column.name).fill_null([]))
        return _parsed(frame, rows, bad)


def _parsed(frame: pl.DataFrame, rows: int, bad: list[tuple[int, str]]) -> Parsed:
    positions: np.ndarray = frame.get_column("row").to_numpy()
    whole = frame.height == rows
    return Parsed(frame.drop("row"), None if whole else positions, sorted(bad))
