"""From partial counts to a ranked vocabulary file, one feature at a time, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel

from embcomp.data_pipelines.preparing.counting import held_bytes, merged_counts
from embcomp.data_pipelines.preparing.row_writer import RowGroupWriter
from embcomp.data_pipelines.schema import FIRST_ID, LARGEST_ID, FileRecord, VocabularyChange
from embcomp.data_pipelines.splits import exact
from embcomp.errors import DataError

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
VOCABULARY_SCHEMA = pa.schema(
    [("id", pa.int32()), ("value", pa.large_string()), ("count", pa.int64())]
)
"""The columns of a vocabulary of one dataset, whose rows come by rising id."""
WORKING_FACTOR = 4
"""What merging or sorting needs at once, as a multiple of the frame's own size."""
_MERGING_FACTOR = 8
"""The same for partitions that are merged together although each would do by itself."""


class Ranked(BaseModel):
    """What ranking found.

    Distinct raw values, those kept, the quantiles of `dataset.json`, what the vocabulary file is (None where
    ids are hashes), the ids in use up to the highest, and what changed since an earlier dataset where it was one that goes on.
    """

    raw_values: int
    kept: int
    quantiles: dict[str, int]
    record: FileRecord | None
    used: int
    change: VocabularyChange | None = None


class Quantiles:
    """Where the ids up to one carry a share of all look-ups, while these come by rising id.

    Args:
        missing: look-ups of id 0.
        rare: look-ups of id 1.
        total: all look-ups.
    """

    def __init__(self, missing: int, rare: int, total: int) -> None:
        self._before = missing + rare
        self._edges = [math.ceil(exact(share) * total) for share in SHARES]
        # Ids 0 and 1 carry traffic too: a quantile may end there.
        self._ids = [0 if missing and missing >= edge else 1 for edge in self._edges]
        self._done = [total == 0 or self._before >= edge for edge in self._edges]

    def take(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Take in the next (n,) ids and how often each occurs."""
        if not len(ids):
            return
        cumulated = self._before + counts.cumsum()
        for i, edge in enumerate(self._edges):
            if not self._done[i] and cumulated[-1] >= edge:
                self._ids[i] = int(ids[np.searchsorted(cumulated, edge)])
                self._done[i] = True
        self._before = int(cumulated[-1])

    def ids(self) -> dict[str, int]:
        """The quantiles as `dataset.json` has them."""
        return {str(share): at for share, at in zip(SHARES, self._ids)}


def vocabulary_file(name: str, position: int) -> str:
    """Return the relative path of a feature's vocabulary; odd characters are replaced."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    # The position keeps names apart that differ in odd characters or in case only.
    return f"vocabulary/{position:03d}-{plain[:80]}.parquet"


def build_vocabulary(
    runs: Sequence[Path],
    path: Path,
    *,
    feature: int,
    name: str,
    partitions: int,
    min_count: int,
    missing: int,
    total: int,
    limit: int,
    scratch: Path,
) -> Ranked:
    """Merge a feature's counts and write its vocabulary: columns id, value, count, by rank.

    Args:
        runs: run files of the first pass.
        missing: how many values of the train split got id 0.
        total: how many values the train split has, `missing` among them.
        limit: bytes that merging and sorting may hold at once.
    """
    files: list[Path] = []
    raw_values = kept = size = rare = 0
    for merged in merged_counts(runs, feature, partitions, limit // _MERGING_FACTOR):
        raw_values += merged.height
        frequent = merged.filter(pl.col("count") >= min_count)
        rare += int(merged["count"].sum()) - int(frequent["count"].sum())
        if not frequent.height:
            continue
        kept += frequent.height
        size += held_bytes(frequent)
        file = scratch / f"merged-{len(files):05d}.arrow"
        by_rank(frequent).write_ipc(file)
        files.append(file)
    if kept + FIRST_ID > LARGEST_ID:
        raise DataError(f"{name} has {kept} values; ids go up to {LARGEST_ID}")
    pieces = max(1, -(-size * WORKING_FACTOR // limit))
    quantiles = Quantiles(missing, rare, total)
    first = FIRST_ID
    with RowGroupWriter(path, VOCABULARY_SCHEMA) as writer:
        for piece in ranked_ranges(files, kept, pieces):
            ids = np.arange(first, first + piece.height, dtype=np.int32)
            quantiles.take(ids, piece["count"].to_numpy())
            table = piece.with_columns(pl.Series("id", ids)).select("id", "value", "count")
            writer.write(
                table.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(VOCABULARY_SCHEMA)
            )
            first += piece.height
    for file in files:
        file.unlink()
    return Ranked(
        raw_values=raw_values,
        kept=kept,
        quantiles=quantiles.ids(),
        record=writer.record(),
        used=first,
    )


def by_rank(counts: pl.DataFrame) -> pl.DataFrame:
    """Counts of values, the most frequent first, ties by the value's bytes."""
    return counts.sort("count", "value", descending=[True, False])


def ranked_ranges(files: Sequence[Path], rows: int, pieces: int) -> Iterator[pl.DataFrame]:
    """Yield the rows of sorted files in one common order, a range of ranks at a time."""
    if not files:
        return
    if pieces == 1:
        whole = pl.concat([pl.read_ipc(file) for file in files])
        yield whole if len(files) == 1 else by_rank(whole)
        return
    # Every m-th row of each file: their own order then cuts the whole into ranges of equal size.
    step = max(1, rows // (pieces * 32))
    sample = by_rank(
        pl.concat([pl.scan_ipc(f).gather_every(step).collect(engine="streaming") for f in files])
    )
    cuts = sample.gather_every(max(1, -(-sample.height // pieces))).rows()[1:]
    for low, high in zip([None, *cuts], [*cuts, None]):
        inside = pl.lit(True)
        if low is not None:
            inside &= ~_ranks_before(low)
        if high is not None:
            inside &= _ranks_before(high)
        yield by_rank(
            pl.concat([pl.scan_ipc(f).filter(inside).collect(engine="streaming") for f in files])
        )


def _ranks_before(row: tuple[str, int]) -> pl.Expr:
    value, count = row
    here = pl.col("count")
    return (here > count) | ((here == count) & (pl.col("value") < value))
