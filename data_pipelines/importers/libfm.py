"""libFM, libSVM and libFFM text: `label token token ...`, a row per line.

The forms, told apart by the first lines unless the caller says:

- `indices` (`1 451:1 4149:1 5041:1`): each row has the same number of tokens, the k-th token is
  field k and its index the category. This is how libFM files of Frappe or MovieLens are written;
- `bag` (the same tokens, a varying number of them): one multi-valued feature `index`;
- `pairs` (`1 user:17 movie:99`): field name and category;
- `ffm` (`1 0:451:1 1:4149:1`): field, category and the weight 1.

Tokens are parted by spaces or tabs. A weight other than 1 is malformed: categories have no weights
here. What the sample shows of real values, query ids (`qid:3`), weights of rows behind the label
(`1:0.5`) or comments is refused by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
from typing_extensions import Self, override

from embcomp.data_pipelines.importers.base import (
    CategoricalColumn,
    Importer,
    Layout,
    RawFile,
    RawTable,
)
from embcomp.data_pipelines.importers.compressed import compression, unpacked, unpacking
from embcomp.data_pipelines.importers.text import Parsed, TextTable, read_head, split_lines
from embcomp.errors import DataError

Form = Literal["auto", "indices", "bag", "pairs", "ffm"]
_SAMPLE_LINES = 10_000
_HEAD = 100  # lines that tell whether a file has labels
_SCANNED_BYTES = 4 << 20
_MOST_FIELDS = 10_000
_ONE = r":1(\.0*)?$"
_LABELS = {"1": 1.0, "1.0": 1.0, "+1": 1.0, "0": 0.0, "0.0": 0.0, "-1": 0.0, "-1.0": 0.0}
_PATTERNS = {
    "pairs": r"^([^:]+):(.+)$",
    "ffm": r"^([^:]+):([^:]+)" + _ONE,
    "bag": r"^()([^:]+)" + _ONE,
}
_WHOLE_PAIRS = r"^([^:]+):([^:.]+)$"
_NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
_REAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(\.\d*)?[eE][+-]?\d+)")


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A line of the sample: its place and its tokens after the label."""

    place: str
    tokens: list[str]


@dataclass(frozen=True, kw_only=True)
class KnownFields:
    """What the tokens of a dataset are.

    Attributes:
        form: never `auto`.
        fields: their fields, as the tokens name them.
        bags: for each, whether a row may have several.
        whole_values: whether a value with a point in it is a weight, and malformed.
    """

    form: Form
    fields: tuple[str, ...]
    bags: tuple[bool, ...]
    whole_values: bool = False

    @property
    def pattern(self) -> str:
        """The regular expression that a line's tokens match."""
        return _WHOLE_PAIRS if self.whole_values else _PATTERNS[self.form]


@dataclass(frozen=True, kw_only=True)
class LibFMImporter(Importer):
    """libFM, libSVM or libFFM lines; labels -1 and 0 both mean 0."""

    name: ClassVar[str] = "libfm"
    title: ClassVar[str] = "libFM text: label index:1 ..., label field:value ... or libFFM"
    form: Form = "auto"
    known: KnownFields | None = None
    """The fields of a dataset whose further rows are to be scored."""

    @override
    def options(self, table: RawTable) -> dict[str, Any]:
        assert isinstance(table, IndexTable | PairTable)
        return asdict(table.known)

    @classmethod
    @override
    def with_options(cls, options: Mapping[str, Any]) -> Self:
        names, bags = tuple(options["fields"]), tuple(options["bags"])
        form, whole = options["form"], options["whole_values"]
        return cls(
            form=form, known=KnownFields(form=form, fields=names, bags=bags, whole_values=whole)
        )

    @override
    def open_to_score(self, files: Sequence[RawFile]) -> TextTable:
        if self.known is None:
            table = self._opened(files)
            table.to_score = True
        elif self.known.form == "indices":
            table = IndexTable(files, fields=len(self.known.fields), to_score=True)
        else:
            table = PairTable(files, known=self.known, to_score=True)
        table.has_labels = any(_has_labels(file.path) for file in files)
        return table

    @override
    def open(self, files: Sequence[RawFile]) -> IndexTable | PairTable:
        for file in files:
            _refuse_row_weights(file.path)
        return self._opened(files)

    def _opened(self, files: Sequence[RawFile]) -> IndexTable | PairTable:
        sample = [line for file in files for line in _sample(file.path)]
        if not sample:
            raise DataError(f"{files[0].path} is empty; expected {self.title}")
        _refuse_what_is_no_token(sample)
        form = _guess(sample) if self.form == "auto" else self.form
        if form == "indices":
            lengths = Counter(len(line.tokens) for line in sample)
            return IndexTable(files, fields=lengths.most_common(1)[0][0])
        # A fraction behind a number is a weight at an index, wherever it turns up.
        whole = self.form == "auto" and form == "pairs" and _has_numbered_fields(sample)
        return PairTable(files, known=_scan(files, form, whole_values=whole))


def _has_labels(path: Path) -> bool:
    return any(b":" not in line.split()[0] for line in read_head(path, _HEAD) if line.split())


def _refuse_row_weights(path: Path) -> None:
    """Raise where lines begin with `label:weight`, as XGBoost reads them."""
    for number, line in enumerate(read_head(path, _HEAD), 1):
        first = line.decode("utf-8", "replace").partition("\t")[0].strip().partition(" ")[0]
        label, colon, weight = first.partition(":")
        if colon and label in _LABELS and re.fullmatch(_NUMBER, weight):
            raise DataError(
                f"{path}, line {number}: it begins with {first!r}; where that is a label and the "
                f"weight of its row, libFM lines have no place for it here: make columns of them, and "
                f"read them with the `table` importer and `weight: COLUMN` in its schema. Where it is "
                f"a token, put the label before it"
            )


def _sample(path: Path) -> Iterator[_Line]:
    for number, line in enumerate(read_head(path, _SAMPLE_LINES), 1):
        tokens = re.split(r"[ \t]+", line.decode("utf-8", "replace").strip(" \t"))[1:]
        if tokens:
            yield _Line(place=f"{path}, line {number}", tokens=tokens)


def _refuse_what_is_no_token(sample: Sequence[_Line]) -> None:
    for line in sample:
        for token in line.tokens:
            if token.startswith("qid:"):
                raise DataError(
                    f"{line.place}: {token!r} is a query id of ranking data, which is not read; "
                    f"leave it out, or make it a field of its own, such as 'query:{token[4:]}'"
                )
            if token.startswith("#"):
                raise DataError(
                    f"{line.place}: comments (from {token!r} on) are not read; leave them out"
                )


def _guess(sample: Sequence[_Line]) -> Form:
    counts = Counter(token.count(":") for line in sample for token in line.tokens)
    colons = counts.most_common(1)[0][0]
    if colons not in (1, 2) or not _is_nearly_all(counts):
        raise DataError(_form_fault(sample, colons))
    # What a few malformed lines say must not decide; they are named when they are read.
    sound = [line for line in sample if all(t.count(":") == colons for t in line.tokens)]
    sample = sound or sample
    if colons == 2:
        _refuse_weights(sample)
        return "ffm"
    values = {token.rpartition(":")[2] for line in sample for token in line.tokens}
    if not values <= {"1", "1.0"}:
        if _has_numbered_fields(sample):
            _refuse_unless_fields(sample)
        return "pairs"
    lengths = Counter(len(line.tokens) for line in sample)
    return "indices" if _is_nearly_all(lengths) else "bag"


def _form_fault(sample: Sequence[_Line], common: int) -> str:
    tokens = [(line.place, token) for line in sample for token in line.tokens]
    place, odd = next(
        ((place, token) for place, token in tokens if token.count(":") != common), tokens[0]
    )
    return (
        f"{place}: tokens are index:1, field:value or field:index:1, all of one form, and {odd!r} "
        f"has {odd.count(':')} colons where most have {common}"
    )


def _has_numbered_fields(sample: Sequence[_Line]) -> bool:
    return all(token.partition(":")[0].isdecimal() for line in sample for token in line.tokens)


def _refuse_weights(sample: Sequence[_Line]) -> None:
    for line in sample:
        for token in line.tokens:
            weight = token.rpartition(":")[2]
            if not re.fullmatch(_ONE, f":{weight}"):
                raise DataError(_weight_fault(line, token, weight))


def _refuse_unless_fields(sample: Sequence[_Line]) -> None:
    """Raise unless `3:7` can only mean category 7 of field 3, and not a weight of 7 at index 3."""
    for line in sample:
        for token in line.tokens:
            if _REAL.fullmatch(value := token.partition(":")[2]) and float(value) != 1.0:
                raise DataError(_weight_fault(line, token, value))
    fields = Counter(tuple(token.partition(":")[0] for token in line.tokens) for line in sample)
    if not _is_nearly_all(fields):
        line, token = next(
            (line, token) for line in sample for token in line.tokens if not token.endswith(":1")
        )
        raise DataError(
            f"{line.place}: {token!r} may be a category of a field, or a weight at an index, "
            f"which is not read. Say that tokens are field:value with `--form pairs` "
            f"(LibFMImporter(form='pairs')), or write 1 as the weight of every index"
        )


def _is_nearly_all(counts: Counter[Any]) -> bool:
    """Whether the most frequent one is at least 99 % of them."""
    return 100 * counts.most_common(1)[0][1] >= 99 * counts.total()


def _weight_fault(line: _Line, token: str, weight: str) -> str:
    return (
        f"{line.place}: the weight of {token!r} is {weight}, not 1, and categories have no weights "
        f"here. Make numeric columns of real values and read them with the `table` importer, or "
        f"write 1 as the weight of every index"
    )


class _Lines(TextTable):
    """The split of a line into label and tokens, which all forms share."""

    def tokens(self, data: bytes) -> tuple[pl.DataFrame, list[tuple[int, str]]]:
        """Return columns row (offset), label, tokens (list of strings), and the bad rows.

        A line to score may start with its first token, and has no label then.
        """
        texts, bad = _decoded(data)
        if self.to_score:
            empty = [at for at, text in enumerate(texts) if text is not None and not text.strip()]
            bad += [(at, "the line is empty") for at in empty]
            texts = [text if text is None or text.strip() else None for text in texts]
        first = pl.col("tokens").list.first()
        bare = first.str.contains(":", literal=True) & self.to_score
        spaced = pl.Series("tokens", texts, dtype=pl.String).str.replace_all(
            "\t", " ", literal=True
        )
        parts = spaced.str.strip_chars(" ").str.split(" ")
        frame = (
            pl.DataFrame({"tokens": parts})
            .with_row_index("row")
            .drop_nulls("tokens")
            .select(
                pl.col("row").cast(pl.Int64),
                first.replace_strict(_LABELS, default=None, return_dtype=pl.Float32).alias("label"),
                pl.when(bare)
                .then(pl.col("tokens"))
                .otherwise(pl.col("tokens").list.slice(1))
                .list.eval(pl.element().filter(pl.element() != ""))
                .alias("tokens"),
            )
        )
        return frame, bad


def _decoded(data: bytes) -> tuple[list[str | None], list[tuple[int, str]]]:
    """Return the text of each line, None where it is none, and the bad rows."""
    bad: list[tuple[int, str]] = []
    texts: list[str | None] = []
    for at, line in enumerate(split_lines(data)):
        try:
            texts.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            texts.append(None)
            bad.append((at, f"byte {error.start + 1} is not UTF-8"))
    return texts, bad


class IndexTable(_Lines):
    """Rows of a fixed number of `index:1` tokens: field k is the k-th of them."""

    def __init__(self, files: Sequence[RawFile], *, fields: int, to_score: bool = False) -> None:
        names = tuple(f"field_{k}" for k in range(fields))
        super().__init__(
            files, Layout(categorical=tuple(CategoricalColumn(name=name) for name in names))
        )
        self.known = KnownFields(form="indices", fields=names, bags=(False,) * fields)
        self.to_score = to_score

    @override
    def parse(self, data: bytes, rows: int, file: int) -> Parsed:
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

    def __init__(
        self, files: Sequence[RawFile], *, known: KnownFields, to_score: bool = False
    ) -> None:
        prefix = "field_" if all(name.isdigit() for name in known.fields) else ""
        columns = tuple(
            CategoricalColumn(name=prefix + name, multi_valued=bag)
            for name, bag in zip(known.fields, known.bags)
        )
        super().__init__(files, Layout(categorical=columns))
        self.known = known
        self.form, self.pattern, self.fields = known.form, known.pattern, list(known.fields)
        self.to_score = to_score

    @override
    def parse(self, data: bytes, rows: int, file: int) -> Parsed:
        frame, bad = self.tokens(data)
        pairs = (
            frame.select("row", "tokens")
            .explode("tokens", empty_as_null=True, keep_nulls=True)
            .drop_nulls("tokens")
            .with_columns(pl.col("tokens").str.extract_groups(self.pattern).alias("parts"))
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
                (row, f"token {token!r} {reason}{self._hint(token, reason)}")
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

    def _hint(self, token: str, reason: str) -> str:
        if reason != "cannot be read" or self.form == "bag" or token.count(":") < 1:
            return ""
        weight = token.rpartition(":")[2]
        if self.form == "ffm" and token.count(":") == 2 and not re.fullmatch(_ONE, f":{weight}"):
            return f": its weight is {weight}, not 1, and categories have no weights here"
        return ": a weight is no category" if _REAL.fullmatch(weight) else ""


def _scan(files: Sequence[RawFile], form: Form, *, whole_values: bool) -> KnownFields:
    """Return all fields of all lines, and whether a row has one of them twice.

    A sample would miss the fields that appear late.
    """
    if form == "bag":
        return KnownFields(form=form, fields=("index",), bags=(True,))
    unknown = KnownFields(form=form, fields=(), bags=(), whole_values=whole_values)
    reader = PairTable(files, known=unknown)
    found: dict[str, bool] = {}
    for file in files:
        for data in _pieces(file.path):
            frame, _ = reader.tokens(data)
            fields = (
                frame.select("row", "tokens")
                .explode("tokens", empty_as_null=True, keep_nulls=True)
                .select("row", pl.col("tokens").str.extract(unknown.pattern).alias("field"))
                .drop_nulls("field")
            )
            twice = set(fields.filter(fields.is_duplicated()).get_column("field").unique())
            for name in fields.get_column("field").unique():
                found[name] = found.get(name, False) or name in twice
            if len(found) > _MOST_FIELDS:
                raise DataError(
                    f"{file.path} names more than {_MOST_FIELDS} fields; each becomes a "
                    f"feature. Are its tokens {form}?"
                )
    order = sorted(found, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n))
    bags = tuple(found[name] for name in order)
    return KnownFields(form=form, fields=tuple(order), bags=bags, whole_values=whole_values)


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces of whole lines."""
    kind = compression(path)
    with unpacking(path, kind), path.open("rb") as disk, unpacked(disk, kind) as stream:
        while data := stream.read(_SCANNED_BYTES):
            yield data + stream.readline()


def _parsed(frame: pl.DataFrame, rows: int, bad: list[tuple[int, str]]) -> Parsed:
    positions: np.ndarray = frame.get_column("row").to_numpy()
    whole = frame.height == rows
    return Parsed(frame.drop("row"), None if whole else positions, sorted(bad))
