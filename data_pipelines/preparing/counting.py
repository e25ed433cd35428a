"""The first pass: how often each value occurs in the train split, in bounded memory.

Each part of the input leaves run files of partial counts on disk, cut by feature and by hash of
the value; so a pass that was killed goes on with the next part, and the counts of one feature and
hash partition can later be merged on their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from embcomp.data_pipelines.importers.base import WEIGHT, BadRow, Block, RawTable, Rows
from embcomp.data_pipelines.loader.prefetch import ahead
from embcomp.data_pipelines.preparing.features import Features, flat_values
from embcomp.data_pipelines.preparing.given_ids import check_given_ids
from embcomp.data_pipelines.preparing.text_hash import hash_texts
from embcomp.data_pipelines.sample_weights import sum_of
from embcomp.data_pipelines.splits import SPLITS
from embcomp.data_pipelines.transforms import NumericStats, needs_figures
from embcomp.io.atomic_files import atomic_path
from embcomp.io.digests import HashedFile
from embcomp.io.remote_paths import RemotePath

TRAIN = SPLITS.index("train")
SplitOf = Callable[[Block, Rows], np.ndarray]
"""Gives the index in `SPLITS` of each usable row of a block, (rows,) int8."""

_RUN_SCHEMA = pa.schema([("value", pa.large_string()), ("count", pa.int64())])


class BadLine(BaseModel):
    """A `BadRow` as it is kept on disk; the bytes are kept as Latin-1 text, which loses none."""

    path: str
    line: int
    reason: str
    raw: str

    @classmethod
    def of(cls, bad: BadRow) -> BadLine:
        """Make the JSON form of a malformed row."""
        return cls(path=bad.path, line=bad.line, reason=bad.reason, raw=bad.raw.decode("latin-1"))

    def row(self) -> BadRow:
        """Return the malformed row, byte for byte."""
        return BadRow(
            path=self.path, line=self.line, reason=self.reason, raw=self.raw.encode("latin-1")
        )


class StoredPart(BaseModel):
    """What the count pass left of a part for the encode pass: files of the folder of counts.

    Attributes:
        rows: the file of its rows.
        sha256: of that file.
        runs: the files of its values, which number them, in order.
    """

    rows: str
    sha256: str
    runs: list[str]


class FeatureCounts(BaseModel):
    """Figures of one categorical feature; `values` counts bag entries of the train split."""

    missing: int = 0
    train_missing: int = 0
    train_values: int = 0
    max_length: int = 0


class PartCounts(BaseModel):
    """What the first pass found in one part of the input."""

    # A part without train rows has infinite extremes, which plain JSON would turn into null.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    rows: list[int] = Field(default_factory=lambda: [0] * len(SPLITS))
    positives: list[int] = Field(default_factory=lambda: [0] * len(SPLITS))
    weights: list[float] = Field(default_factory=lambda: [0.0] * len(SPLITS))
    dropped: int = 0
    bad: list[BadLine] = Field(default_factory=list)
    numeric: dict[str, NumericStats] = Field(default_factory=dict)
    numeric_missing: dict[str, int] = Field(default_factory=dict)
    categorical: dict[str, FeatureCounts] = Field(default_factory=dict)
    runs: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the run files, by name."""
    stored: list[StoredPart | None] = Field(default_factory=list)
    """For each part, what the encode pass may read instead of the input."""

    def merge(self, other: PartCounts) -> None:
        """Add the figures of a later part."""
        self.rows = [a + b for a, b in zip(self.rows, other.rows)]
        self.positives = [a + b for a, b in zip(self.positives, other.positives)]
        self.weights = [a + b for a, b in zip(self.weights, other.weights)]
        self.dropped += other.dropped
        self.bad += other.bad
        self.runs |= other.runs
        self.stored += other.stored
        for name, stats in other.numeric.items():
            self.numeric.setdefault(name, NumericStats()).merge(stats)
        for name, missing in other.numeric_missing.items():
            self.numeric_missing[name] = self.numeric_missing.get(name, 0) + missing
        for name, theirs in other.categorical.items():
            mine = self.categorical.setdefault(name, FeatureCounts())
            mine.missing += theirs.missing
            mine.train_missing += theirs.train_missing
            mine.train_values += theirs.train_values
            mine.max_length = max(mine.max_length, theirs.max_length)


class RunWriter:
    """Counts of the current part; they move to a run file whenever they outgrow `limit` bytes."""

    def __init__(self, features: int, partitions: int, folder: Path, prefix: str, limit: int):
        self.partitions = partitions
        self.files: dict[str, str] = {}
        self._folder = folder
        self._prefix = prefix
        self._limit = limit
        self._frames: list[list[pl.DataFrame]] = [[] for _ in range(features)]
        self._bytes = 0

    def add(self, feature: int, counts: pl.DataFrame) -> None:
        """Take in columns value (String) and count (Int64) of one feature."""
        self._frames[feature].append(counts)
        self._bytes += held_bytes(counts)
        if self._bytes > self._limit:
            self._frames = [[merge_counts(frames)] if frames else [] for frames in self._frames]
            self._bytes = sum(held_bytes(frame) for frames in self._frames for frame in frames)
            # Merged counts that still fill half the room would be merged again and again.
            if self._bytes > self._limit // 2:
                self.flush()

    def flush(self) -> None:
        """Write a run file: one record batch per feature and partition."""
        if not any(self._frames):
            return
        name = f"{self._prefix}-{len(self.files):03d}.arrow"
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with (
            atomic_path(self._folder / name, durable=False) as temporary,
            HashedFile(temporary) as file,
            pa.ipc.new_file(file, _RUN_SCHEMA, options=options) as writer,
        ):
            for feature, frames in enumerate(self._frames):
                merged = merge_counts(frames)
                self._frames[feature] = []
                for part in cut_by_hash(merged, self.partitions):
                    table = part.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(_RUN_SCHEMA)
                    columns = [column.combine_chunks() for column in table.columns]
                    writer.write_batch(pa.record_batch(columns, schema=_RUN_SCHEMA))
        self.files[name] = file.sha256
        self._bytes = 0


def held_bytes(counts: pl.DataFrame) -> int:
    """Return what a frame of counts takes; polars' own figure leaves out the views of texts."""
    return int(counts.estimated_size()) + 16 * counts.height


def merge_counts(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Add up the counts of equal values; the order is not defined."""
    if not frames:
        return pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})
    if len(frames) == 1:
        return frames[0]
    merged = pl.concat([frame.lazy() for frame in frames]).group_by("value").agg(pl.sum("count"))
    return merged.collect(engine="streaming")


def cut_by_hash(counts: pl.DataFrame, partitions: int) -> list[pl.DataFrame]:
    """Split counts by a hash of the value."""
    if partitions == 1:
        return [counts]
    # numpy before 2.1 counts signed numbers only.
    cells = (hash_texts(counts["value"], seed=1) % np.uint64(partitions)).astype(np.int64)
    keyed = counts.with_columns(pl.Series("cell", cells)).sort("cell")
    sizes = np.bincount(keyed.get_column("cell").to_numpy(), minlength=partitions)
    ends = np.cumsum(sizes)
    bare = keyed.drop("cell")
    return [bare.slice(int(end - size), int(size)) for end, size in zip(ends, sizes)]


def merged_counts(
    runs: Sequence[Path], feature: int, partitions: int, room: int
) -> Iterator[pl.DataFrame]:
    """Yield the counts of a feature: all of some whole partitions, as many as `room` bytes of runs hold.

    A partition that takes more comes by itself. The order of a frame's values is not defined.
    """
    frames: list[pl.DataFrame] = []
    held = 0
    # A run has each value once.
    merge = merge_counts if len(runs) > 1 else pl.concat
    for partition in range(partitions):
        come = [read_run(run, feature * partitions + partition) for run in runs]
        size = sum(map(held_bytes, come))
        if frames and held + size > room:
            yield merge(frames)
            frames, held = [], 0
        frames += come
        held += size
    if frames:
        yield merge(frames)


def read_run(path: Path, batch: int) -> pl.DataFrame:
    """Read the counts of one feature and partition (`feature * partitions + partition`).

    Values that only other splits have are left out: their rows were stored, and they are not counted.
    """
    frame = read_batch(path, batch)
    if "number" not in frame.columns:
        return frame
    counts = frame.select("value", "count")
    is_counted = frame["count"].to_numpy() > 0
    return counts if is_counted.all() else counts.filter(pl.Series(is_counted))


def read_batch(path: Path, batch: int) -> pl.DataFrame:
    """Read a batch of a run file as it is."""
    with (
        pa.PythonFile(path.open("rb"), mode="r")
        if isinstance(path, RemotePath)
        else pa.OSFile(str(path)) as file
    ):
        found = pa.ipc.open_file(file).get_batch(batch)
        frame = pl.from_arrow(pa.Table.from_batches([found]))
    assert isinstance(frame, pl.DataFrame)
    return frame


@dataclass(kw_only=True)
class CountedBlock:
    """The usable rows of a block, B of them, on their way through the count pass.

    Attributes:
        block: where they come from.
        rows: what the table read.
        frame: what `Features.columns` made of it. A categorical column of one value a row may hold numbers
            of values (UInt32, 0 where missing).
        values: where values were numbered, the numbers of each categorical feature, of bags in a row; or
            ids where these are hashes.
        run: which run of the part numbers them.
    """

    block: Block
    rows: Rows
    frame: pl.DataFrame
    values: dict[int, NDArray[Any]] = field(default_factory=dict)
    run: int = 0

    def lengths(self, name: str) -> NDArray[np.int64]:
        """Return the (B,) lengths of a feature's bags."""
        lengths = self.frame.get_column(name).list.len().fill_null(0)
        return lengths.to_numpy().astype(np.int64)


class ValueSink(Protocol):
    """Where the values of a part go.

    Attributes:
        files: SHA-256 of the run files so far, by name.
        stored: what the encode pass may read instead of the input, once all is flushed.
    """

    files: dict[str, str]
    stored: StoredPart | None

    def read(self, table: RawTable, blocks: Sequence[Block]) -> Iterator[CountedBlock]:
        """Yield the rows of blocks in order, in a thread of its own."""

    def take(self, block: CountedBlock, splits: NDArray[np.int8]) -> None:
        """Count the values of a block, given the (B,) splits of its rows."""

    def flush(self) -> None:
        """Write what is held."""


class CountedValues(RunWriter):
    """Counts the values of the train rows of a part; a `ValueSink`."""

    stored: StoredPart | None = None

    def __init__(
        self, features: Features, partitions: int, folder: Path, prefix: str, limit: int
    ) -> None:
        super().__init__(len(features.categorical), partitions, folder, prefix, limit)
        self._features = features

    def read(self, table: RawTable, blocks: Sequence[Block]) -> Iterator[CountedBlock]:
        """Yield the rows of blocks; see `ValueSink`."""
        for block, rows in table.read(blocks):
            yield CountedBlock(block=block, rows=rows, frame=self._features.columns(rows.frame))

    def take(self, block: CountedBlock, splits: NDArray[np.int8]) -> None:
        """Count the values of the train rows of a block; see `ValueSink`."""
        is_train = pl.Series(splits == TRAIN)
        for place, feature in enumerate(self._features.categorical):
            if not feature.is_counted:
                continue
            values = block.frame.get_column(feature.name).filter(is_train)
            values = flat_values(values) if feature.multi_valued else values.drop_nulls()
            counts = values.alias("value").value_counts(name="count")
            self.add(place, counts.cast({"count": pl.Int64}))


def count_part(
    table: RawTable,
    blocks: Sequence[Block],
    *,
    features: Features,
    split_of: SplitOf,
    runs: ValueSink,
    check_bad: Callable[[Sequence[BadRow]], None],
    advance: Callable[[int], None],
) -> PartCounts:
    """Count one part of the input.

    Args:
        check_bad: called with the bad rows of this part so far; raises when they are too many.
    """
    part = PartCounts()
    bad: list[BadRow] = []
    for found in ahead(runs.read(table, blocks)):
        block, rows, frame = found.block, found.rows, found.frame
        splits = split_of(block, rows)
        check_given_ids(frame, features, str(table.files[block.file].path))
        bad += rows.bad
        if rows.bad:
            check_bad(bad)
        part.dropped += rows.dropped
        _count_rows(part, frame, splits)
        _count_numbers(part, frame, splits == TRAIN, features)
        for feature in features.categorical:
            figures = part.categorical.setdefault(feature.name, FeatureCounts())
            _count_values(figures, frame.get_column(feature.name), splits == TRAIN)
        runs.take(found, splits)
        advance(block.rows)
    runs.flush()
    part.bad = [BadLine.of(row) for row in bad]
    part.runs = runs.files
    part.stored = [runs.stored]
    return part


def _count_numbers(
    part: PartCounts, frame: pl.DataFrame, is_train: NDArray[np.bool_], features: Features
) -> None:
    for column in features.numeric:
        missing = frame.get_column(column.name).null_count()
        part.numeric_missing[column.name] = part.numeric_missing.get(column.name, 0) + missing
    names = [column.name for column in features.numeric if needs_figures(column.transform)]
    if not names:
        return
    train = frame.select(names)
    train = train if is_train.all() else train.filter(pl.Series(is_train))
    for name in names:
        part.numeric.setdefault(name, NumericStats()).update(train.get_column(name))


def _count_values(figures: FeatureCounts, column: pl.Series, is_train: NDArray[np.bool_]) -> None:
    train = int(np.count_nonzero(is_train))
    if column.dtype == pl.List:
        lengths = column.list.len().fill_null(0).to_numpy()
        figures.missing += int((lengths == 0).sum())
        figures.max_length = max(figures.max_length, int(lengths.max(initial=0)))
        figures.train_missing += int((lengths[is_train] == 0).sum())
        figures.train_values += int(lengths[is_train].sum())
        return
    # Of numbers, polars would make a mask of bits, which costs many times the comparison.
    numbered = column.dtype == pl.UInt32
    is_missing = column.to_numpy() == 0 if numbered else column.is_null().to_numpy()
    missing = missing_of_train = int(np.count_nonzero(is_missing))
    if missing and train < len(column):
        missing_of_train = int(np.count_nonzero(is_missing & is_train))
    figures.missing += missing
    figures.max_length = 1
    figures.train_missing += missing_of_train
    figures.train_values += train - missing_of_train


def _count_rows(part: PartCounts, frame: pl.DataFrame, codes: np.ndarray) -> None:
    labels = frame.get_column("label").to_numpy()
    for code in range(len(SPLITS)):
        part.rows[code] += int((codes == code).sum())
        part.positives[code] += int(labels[codes == code].sum(dtype=np.float64))
        if WEIGHT in frame.columns:
            part.weights[code] += sum_of(frame.get_column(WEIGHT).to_numpy()[codes == code])
