"""From partial counts to a ranked vocabulary file, one feature at a time, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel

from embcomp.data_pipelines.preparing.counting import held_bytes, merge_counts, read_run
from embcomp.data_pipelines.preparing.row_writer import RowGroupWriter
from embcomp.data_pipelines.schema import FIRST_ID, LARGEST_ID, FileRecord
from embcomp.data_pipelines.splits import exact
from embcomp.errors import DataError

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
_SCHEMA = pa.schema([("id", pa.int32()), ("value", pa.large_string()), ("count", pa.int64())])
# What merging or sorting needs at once, as a multiple of the frame's own size.
_WORKING_FACTOR = 4


class Ranked(BaseModel):
    """What ranking found.

    Distinct raw values, those kept, the quantiles of `dataset.json`, and what the vocabulary file is.
    """

    raw_values: int
    kept: int
    quantiles: dict[str, int]
    record: FileRecord


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
    for partition in range(partitions):
        batch = feature * partitions + partition
        merged = merge_counts([read_run(run, batch) for run in runs])
        raw_values += merged.height
        frequent = merged.filter(pl.col("count") >= min_count)
        rare += int(merged["count"].sum()) - int(frequent["count"].sum())
        if not frequent.height:
            continue
        kept += frequent.height
        size += held_bytes(frequent)
        file = scratch / f"merged-{partition:05d}.arrow"
        _by_rank(frequent).write_ipc(file)
        files.append(file)
    if kept + FIRST_ID > LARGEST_ID:
        raise DataError(f"{name} has {kept} values; ids go up to {LARGEST_ID}")
    pieces = max(1, -(-size * _WORKING_FACTOR // limit))
    before = missing + rare
    edges = [math.ceil(exact(share) * total) for share in SHARES]
    # Ids 0 and 1 carry traffic too: a quantile may end there.
    ids = [0 if missing and missing >= edge else 1 for edge in edges]
    done = [total == 0 or before >= edge for edge in edges]
    first = FIRST_ID
    with RowGroupWriter(path, _SCHEMA) as writer:
        for piece in _ranges(files, kept, pieces):
            cumulated = before + piece["count"].to_numpy().cumsum()
            for i, edge in enumerate(edges):
                if not done[i] and len(cumulated) and cumulated[-1] >= edge:
                    ids[i] = first + int(np.searchsorted(cumulated, edge))
                    done[i] = True
            table = piece.with_columns(
                pl.int_range(first, first + piece.height, dtype=pl.Int32).alias("id")
            ).select("id", "value", "count")
            writer.write(table.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(_SCHEMA))
            first += piece.height
            before = int(cumulated[-1]) if len(cumulated) else before
    for file in files:
        file.unlink()
    return Ranked(
        raw_values=raw_values,
        kept=kept,
        quantiles={str(share): at for share, at in zip(SHARES, ids)},
        record=writer.record(),
    )


def _by_rank(counts: pl.DataFrame) -> pl.DataFrame:
    return counts.sort("count", "value", descending=[True, False])


def _ranges(files: Sequence[Path], rows: int, pieces: int) -> Iterator[pl.DataFrame]:
    """Yield the rows of sorted files in one common order, a range of ranks at a time."""
    if not files:
        return
    if pieces == 1:
        yield _by_rank(pl.concat([pl.read_ipc(file) for file in files]))
        return
    # Every m-th row of each file: their own order then cuts the whole into ranges of equal size.
    step = max(1, rows // (pieces * 32))
    sample = _by_rank(
        pl.concat([pl.scan_ipc(f).gather_every(step).collect(engine="streaming") for f in files])
    )
    cuts = sample.gather_every(max(1, -(-sample.height // pieces))).rows()[1:]
    for low, high in zip([None, *cuts], [*cuts, None]):
        inside = pl.lit(True)
        if low is not None:
            inside &= ~_ranks_before(low)
        if high is not None:
            inside &= _ranks_before(high)
        yield _by_rank(
            pl.concat([pl.scan_ipc(f).filter(inside).collect(engine="streaming") for f in files])
        )


def _ranks_before(row: tuple[str, int]) -> pl.Expr:
    value, count = row
    here = pl.col("count")
    return (here > count) | ((here == count) & (pl.col("value") < value))
