"""What an importer is: raw files in, blocks of rows in one common shape out.

An importer is a small frozen object that knows one raw format. `open` gives a `RawTable`, which
cuts the files into blocks of a few megabytes and turns each block into a frame:

- `label`: Float32, 0 or 1;
- `WEIGHT`: Float32, finite and not negative, where rows have weights;
- one Float64 column per numeric feature, null where the value is missing;
- one String column per categorical feature, null where missing, or List(String) when it is
  multi-valued, empty where missing.

Everything after that (splits, counting, encoding) is the same for all formats.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar
from urllib.parse import unquote

import numpy as np
import polars as pl
from typing_extensions import Self

from embcomp.data_pipelines.importers.compressed import reading
from embcomp.data_pipelines.numbering import Numbering
from embcomp.data_pipelines.sample_weights import EXPECTED, are_weights
from embcomp.data_pipelines.splits import SplitRule
from embcomp.errors import DataError

NO_LABEL = pl.lit(None, dtype=pl.Float32).alias("label")
"""The label column of rows that came without one."""
DROP = "__drop__"
"""A Boolean column by which `RawTable.shape` marks rows that the label rule leaves out."""
TIME = "__time__"
"""A Float64 column of a layout with a `time`: larger is later, and null is malformed."""
WEIGHT = "__weight__"
"""A Float64 column of a layout with a `weight`, which `RawTable.finish` checks and makes Float32."""
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, kw_only=True)
class NumericColumn:
    """A numeric feature and the transform that it gets unless the caller chooses another."""

    name: str
    transform: str = "log1p"


@dataclass(frozen=True, kw_only=True)
class CategoricalColumn:
    """A categorical feature; `min_count` of None leaves the choice to the caller.

    `hashed` ids are hashes of the values, without a vocabulary. Where values can be taken for
    ids, `num_embeddings` says how many there are; `holds_ids` says that they are.
    """

    name: str
    multi_valued: bool = False
    min_count: int | None = None
    hashed: bool = False
    holds_ids: bool = False
    num_embeddings: int | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The features of a raw table, in the order that the dataset will have.

    `group` is the feature that GAUC groups by, `time` the raw column that a split may go by, `weight`
    the raw column of the rows' weights.
    """

    numeric: tuple[NumericColumn, ...] = ()
    categorical: tuple[CategoricalColumn, ...] = ()
    group: str | None = None
    time: str | None = None
    weight: str | None = None

    @property
    def names(self) -> list[str]:
        """Names of all features, numeric ones first."""
        return [c.name for c in self.numeric] + [c.name for c in self.categorical]


@dataclass(frozen=True, kw_only=True)
class RawFile:
    """One raw file; `split` is set where the caller gave a file per split."""

    path: Path
    split: str | None = None

    @property
    def partitions(self) -> dict[str, str | None]:
        """What the folders just above the file say, as Hive and Spark name them: `day=7`."""
        found: dict[str, str | None] = {}
        for folder in self.path.absolute().parents:
            name, equals, value = folder.name.partition("=")
            if not (name and equals):
                break
            found[unquote(name)] = unquote(value) if value not in ("", _NO_PARTITION) else None
        return found


@dataclass(frozen=True, kw_only=True)
class Block:
    """A contiguous piece of one file.

    `start` and `end` are byte offsets of the uncompressed text, or row offsets of a Parquet file;
    `line` is the 1-based number of its first line, `row` its first row's position in the input.
    """

    file: int
    start: int
    end: int
    line: int
    row: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be used: its place, what is wrong with it, and its bytes."""

    path: str
    line: int
    reason: str
    raw: bytes

    def __str__(self) -> str:
        text = self.raw[:120].decode("utf-8", "backslashreplace")
        return f"{self.path}, line {self.line}: {self.reason}: {text!r}"


@dataclass(kw_only=True)
class Rows:
    """The usable rows of a block.

    `positions` gives, for each row of `frame`, its offset in the block; None means that every row
    of the block is there.
    """

    frame: pl.DataFrame
    positions: np.ndarray | None = None
    bad: list[BadRow] = field(default_factory=list)
    dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class FileIndex:
    """The blocks of one file, its size and checksum on disk and its uncompressed size."""

    blocks: list[Block]
    bytes: int
    sha256: str
    text_bytes: int


class RawTable(ABC):
    """Opened raw files with one layout.

    Attributes:
        to_score: rows are read to be scored: whatever their label is, they are kept, with a null
            where it is none. Digests of the files are not taken.
        has_labels: whether some file has labels; can be False only of a table that is `to_score`.
        has_weights: whether some file has weights of its rows.
        row_limit: how many rows are wanted in all; the index of a text need not go further.
        numberings: what numbers the values of categorical columns, by name. A column of one value a row may
            come as these numbers (UInt32, 0 where missing) instead of texts; rows for which it does not
            are numbered by whoever asked.
    """

    files: list[RawFile]
    layout: Layout
    to_score: bool = False
    has_labels: bool = True
    has_weights: bool = False
    row_limit: int | None = None
    numberings: Mapping[str, Numbering] = MappingProxyType({})

    @abstractmethod
    def index(self, file: int, row: int, advance: Callable[[int], None]) -> FileIndex:
        """Cut one file into blocks.

        Args:
            file: which of `files`.
            row: how many rows the files before it hold.
            advance: called with the number of bytes read on disk, for progress.
        """

    @property
    def starts_anywhere(self) -> bool:
        """Whether the blocks of any part can be read without those before it."""
        return False

    @contextmanager
    def for_part(self) -> Iterator[Self]:
        """The same table for the blocks of a part, which others may read at the same time."""
        if not self.starts_anywhere:
            # Its stream goes on where the part before ended.
            yield self
            return
        own = copy.copy(self)
        try:
            yield own
        finally:
            own.close()

    @abstractmethod
    def read(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Rows]]:
        """Yield the usable rows of consecutive blocks, in order."""

    def close(self) -> None:  # noqa: B027 - many tables hold nothing open
        """Close what `read` left open."""

    def finish(
        self,
        frame: pl.DataFrame,
        positions: np.ndarray | None,
        bad: list[BadRow],
        block: Block,
        raw: Callable[[int], bytes],
    ) -> Rows:
        """Apply the checks that all formats share: the label is 0 or 1, numbers are finite.

        A row whose weight is none is not set aside, as others are: it would shift what the rest means.

        Raises:
            DataError: a row that is to be kept has no weight, or one that cannot be.

        Args:
            frame: columns of the common shape, and maybe `DROP`.
            positions: as in `Rows`.
            bad: rows that parsing has already left out.
            block: where the rows come from.
            raw: gives the bytes of a row by its offset in the block.
        """
        dropped = 0
        keep: np.ndarray | None = None
        if DROP in frame.columns:
            drop = frame.get_column(DROP).to_numpy()
            frame = frame.drop(DROP)
            if not self.to_score:
                dropped = int(drop.sum())
                keep = ~drop if dropped else None
        is_label = ((pl.col("label") == 0) | (pl.col("label") == 1)).fill_null(False)
        checks: list[tuple[pl.Expr, str]] = []
        if self.to_score:
            frame = frame.with_columns(pl.when(is_label).then(pl.col("label")).alias("label"))
        else:
            checks.append((is_label.not_(), "the label is not 0 or 1"))
        checks += [
            (pl.col(c.name).is_infinite().fill_null(False), f"{c.name} is infinite")
            for c in self.layout.numeric
        ]
        if self.layout.time is not None:
            checks.append((pl.col(TIME).is_null(), f"{self.layout.time} is no time"))
        wrong = frame.select(expr.alias(str(i)) for i, (expr, _) in enumerate(checks))
        if checks and wrong.select(pl.any_horizontal(pl.all().any())).item():
            for i, (_, reason) in enumerate(checks):
                mask = wrong.get_column(str(i)).to_numpy()
                keep = np.ones(frame.height, dtype=bool) if keep is None else keep
                for at in np.flatnonzero(mask & keep).tolist():
                    offset = at if positions is None else int(positions[at])
                    bad.append(self.bad_row(block, offset, reason, raw(offset)))
                keep = keep & ~mask
        if keep is not None and not keep.all():
            positions = np.flatnonzero(keep) if positions is None else positions[keep]
            frame = frame.filter(pl.Series(keep))
        if self.layout.weight is not None:
            frame = self._weighted(frame, positions, block, raw)
        return Rows(frame=frame, positions=positions, bad=bad, dropped=dropped)

    def _weighted(
        self,
        frame: pl.DataFrame,
        positions: np.ndarray | None,
        block: Block,
        raw: Callable[[int], bytes],
    ) -> pl.DataFrame:
        """Check the weights; those of rows to score are null where they are none."""
        weights = frame.get_column(WEIGHT)
        sound = are_weights(weights.fill_null(float("nan")).to_numpy())
        if not sound.all() and not self.to_score:
            at = int(np.argmin(sound))
            offset = at if positions is None else int(positions[at])
            value = "missing, or no number" if weights[at] is None else f"{weights[at]:g}"
            reason = (
                f"the weight {self.layout.weight!r} is {value}; expected {EXPECTED}: mend the row, or "
                f"prepare without weights"
            )
            raise DataError(str(self.bad_row(block, offset, reason, raw(offset))))
        stored = pl.when(pl.Series(sound)).then(pl.col(WEIGHT)).cast(pl.Float32).abs()
        return frame.with_columns(stored.alias(WEIGHT))

    def bad_row(self, block: Block, offset: int, reason: str, raw: bytes) -> BadRow:
        """Describe the row at an offset of a block as unusable."""
        path = str(self.files[block.file].path)
        return BadRow(path=path, line=block.line + offset, reason=reason, raw=raw)


def listed(folder: Path) -> list[Path]:
    """Return what a folder holds, but for hidden files and marks such as `_SUCCESS`."""
    with reading(folder):
        return [path for path in folder.iterdir() if path.name[0] not in "._"]


class Importer(ABC):
    """One raw format. Subclasses are frozen dataclasses whose fields are the format's options."""

    name: ClassVar[str]
    title: ClassVar[str]
    rename: ClassVar[str] = "give it another name in the raw files"
    """How a feature gets another name: the way out when a model cannot have the one it has."""

    @abstractmethod
    def open(self, files: Sequence[RawFile]) -> RawTable:
        """Check the files' shape (headers, columns) and describe their rows."""

    def open_to_score(self, files: Sequence[RawFile]) -> RawTable:
        """Open files whose labels may be absent; formats that can tell override it."""
        table = self.open(files)
        table.to_score = True
        return table

    def options(self, table: RawTable) -> dict[str, Any]:
        """Return what `with_options` needs to read more rows as those of a table, in JSON values."""
        return {}

    def weighted_by(self, column: str) -> Importer:
        """Return an importer that reads the weights of rows from a raw column.

        Raises:
            DataError: the format has no such column.
        """
        raise DataError(
            f"rows of the format {self.name!r} have no column {column!r} of weights; describe the "
            f"files in a schema YAML with `weight: {column}`, and read them with `table`"
        )

    @classmethod
    def with_options(cls, options: Mapping[str, Any]) -> Self:
        """Return the importer that reads rows as another one did."""
        return cls()

    @property
    def default_min_count(self) -> int:
        """What `min_count` is where the caller gives none."""
        return 1

    @property
    def default_split(self) -> SplitRule | None:
        """The split rule where the caller gives none; None leaves it to `prepare`."""
        return None

    def find(self, folder: Path) -> list[Path]:
        """Return the raw files of a folder, in row order."""
        found = sorted(path for path in listed(folder) if path.is_file())
        if not found:
            raise DataError(f"{folder} holds no files; expected {self.title}")
        return found
