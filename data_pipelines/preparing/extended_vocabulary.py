"""A vocabulary that goes on from an earlier dataset's: known values keep their ids, new ones come after.

A value that was in as many datasets in a row unseen as the caller allows retires: it leaves the
vocabulary, and its id is free again. New values, ranked among themselves by count (ties by bytes), take
free ids from the lowest on, then the room behind them. A retired value that comes back is a new one.

Memory is bounded as it is for a vocabulary of one dataset: earlier values are cut by the same hash of the
text as counts are, merged partition by partition, and written by ranges of ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from embcomp.data_pipelines.integrity import UNREADABLE
from embcomp.data_pipelines.preparing.counting import (
    cut_by_hash,
    held_bytes,
    merge_counts,
    read_run,
)
from embcomp.data_pipelines.preparing.growth import Growth
from embcomp.data_pipelines.preparing.row_writer import RowGroupWriter
from embcomp.data_pipelines.preparing.vocabulary import (
    WORKING_FACTOR,
    Quantiles,
    Ranked,
    by_rank,
    ranked_ranges,
)
from embcomp.data_pipelines.schema import (
    FIRST_ID,
    LARGEST_ID,
    CategoricalFeature,
    DatasetInfo,
    VocabularyChange,
)
from embcomp.errors import DataError, one_line
from embcomp.io.digests import sha256_of_file
from embcomp.io.parquet_batches import batches_of
from embcomp.io.remote_paths import arrow_input

SCHEMA = pa.schema(
    [
        ("id", pa.int32()),
        ("value", pa.large_string()),
        ("count", pa.int64()),
        ("decayed", pa.float64()),
        ("idle", pa.int32()),
    ]
)
"""Columns of a vocabulary that goes on: `count` is of the dataset's own train split, `decayed` adds what
earlier ones counted, `idle` says in how many datasets up to this one the value has been unseen."""
_AT_ONCE = 1 << 17  # earlier values that are read together


def extend_vocabulary(
    runs: Sequence[Path],
    path: Path,
    *,
    feature: int,
    before: CategoricalFeature,
    growth: Growth,
    partitions: int,
    min_count: int,
    missing: int,
    total: int,
    limit: int,
    scratch: Path,
) -> Ranked:
    """Merge a feature's counts with an earlier vocabulary and write the one that follows.

    Args:
        runs: run files of the first pass.
        path: the vocabulary to write: columns of `SCHEMA`, by id.
        feature: the feature's place.
        before: the feature in the earlier dataset.
        growth: how values go on.
        partitions: into how many parts values are cut by their hash.
        min_count: what a value that is not known yet must reach in the train split.
        missing: how many values of the train split got id 0.
        total: how many values the train split has, `missing` among them.
        limit: bytes that merging and sorting may hold at once.
        scratch: a folder for files on the way.

    Raises:
        DataError: the earlier vocabulary is damaged, or ids run out.
    """
    assert growth.before is not None
    earlier = _cut_earlier(growth.before, before, partitions, scratch)
    known, new = _Sorted(scratch, "known"), _Sorted(scratch, "new")
    raw_values = retired = unseen = rare = 0
    for partition in range(partitions):
        merged = merge_counts([read_run(run, feature * partitions + partition) for run in runs])
        raw_values += merged.height
        old = pl.DataFrame(pa.ipc.open_file(earlier[partition].read_bytes()).read_all())
        earlier[partition].unlink()
        _refuse_twice(growth.before, before, old, "value")
        stays = _going_on(old, merged, growth)
        retired += old.height - stays.height
        unseen += stays.filter(pl.col("count") == 0).height
        known.add(stays.sort("id"))
        fresh = merged.join(old.select("value"), on="value", how="anti")
        frequent = fresh.filter(pl.col("count") >= min_count)
        # What retires today was not seen today, so nothing of the train split is lost with it.
        rare += int(fresh["count"].sum()) - int(frequent["count"].sum())
        new.add(by_rank(frequent))
    kept = known.rows + new.rows
    if kept + FIRST_ID > LARGEST_ID:
        raise DataError(f"{before.name} has {kept} values; ids go up to {LARGEST_ID}")
    quantiles = Quantiles(missing, rare, total)
    used = FIRST_ID
    with RowGroupWriter(path, SCHEMA) as writer:
        coming = _Stream(ranked_ranges(new.files, new.rows, new.pieces(limit)))
        for frame in _by_id(growth.before, before, known, coming, limit):
            if frame.height:
                quantiles.take(frame["id"].to_numpy(), frame["count"].to_numpy())
                used = int(frame["id"][-1]) + 1
            table = frame.select(SCHEMA.names).to_arrow(compat_level=pl.CompatLevel.oldest())
            writer.write(table.cast(SCHEMA))
    for file in [*known.files, *new.files]:
        file.unlink()
    return Ranked(
        raw_values=raw_values,
        kept=kept,
        quantiles=quantiles.ids(),
        record=writer.record(),
        used=used,
        change=VocabularyChange(kept=known.rows, new=new.rows, retired=retired, unseen=unseen),
    )


def _going_on(old: pl.DataFrame, merged: pl.DataFrame, growth: Growth) -> pl.DataFrame:
    """Earlier values with their counts of today; those that retire are left out."""
    found = old.join(merged, on="value", how="left").with_columns(pl.col("count").fill_null(0))
    counts = found["count"].to_numpy()
    decayed = growth.decay * found["decayed"].to_numpy() + counts
    idle = np.where(counts > 0, 0, found["idle"].to_numpy() + 1).astype(np.int32)
    found = found.with_columns(pl.Series("decayed", decayed), pl.Series("idle", idle))
    if growth.retire_after is None:
        return found
    return found.filter(pl.col("idle") < growth.retire_after)


def _by_id(
    info: DatasetInfo, before: CategoricalFeature, known: _Sorted, coming: _Stream, limit: int
) -> Iterator[pl.DataFrame]:
    """All values in the order of their ids, in frames that `limit` has room for."""
    end = before.num_embeddings
    step = max(1, -(-(end - FIRST_ID) // known.pieces(limit)))
    for low in range(FIRST_ID, end, step):
        high = min(end, low + step)
        inside = pl.col("id").is_between(low, high, closed="left")
        parts = [
            pl.scan_ipc(file).filter(inside).collect(engine="streaming") for file in known.files
        ]
        frame = pl.concat([*parts, _NOBODY])
        _refuse_twice(info, before, frame, "id")
        taken = np.zeros(high - low, dtype=bool)
        taken[frame["id"].to_numpy() - low] = True
        free = np.flatnonzero(~taken) + low
        yield pl.concat([frame, *_numbered(coming, free)]).sort("id")
    while True:
        came = coming.take(_AT_ONCE)
        if not came.height:
            return
        yield _fresh(came, np.arange(end, end + came.height))
        end += came.height


def _numbered(coming: _Stream, free: np.ndarray) -> Iterator[pl.DataFrame]:
    """New values for free ids, as many as there are."""
    came = coming.take(len(free))
    yield _fresh(came, free[: came.height])


def _fresh(counts: pl.DataFrame, ids: np.ndarray) -> pl.DataFrame:
    return counts.select(
        pl.Series("id", ids.astype(np.int32)),
        "value",
        "count",
        pl.col("count").cast(pl.Float64).alias("decayed"),
        pl.lit(0, dtype=pl.Int32).alias("idle"),
    )


_NOBODY = pl.DataFrame(
    schema={
        "id": pl.Int32,
        "value": pl.String,
        "count": pl.Int64,
        "decayed": pl.Float64,
        "idle": pl.Int32,
    }
)


class _Sorted:
    """Sorted files of one kind of values, one for each partition that has any."""

    def __init__(self, scratch: Path, name: str) -> None:
        self.files: list[Path] = []
        self.rows = 0
        self._scratch, self._name, self._bytes = scratch, name, 0

    def add(self, frame: pl.DataFrame) -> None:
        if not frame.height:
            return
        if self._name == "known":
            frame = frame.select(_NOBODY.columns)
        file = self._scratch / f"{self._name}-{len(self.files):05d}.arrow"
        frame.write_ipc(file)
        self.files.append(file)
        self.rows += frame.height
        self._bytes += held_bytes(frame)

    def pieces(self, limit: int) -> int:
        """Into how many pieces all files together are to be cut."""
        return max(1, -(-self._bytes * WORKING_FACTOR // limit))


class _Stream:
    """Frames one after another, handed out by any number of rows."""

    def __init__(self, frames: Iterator[pl.DataFrame]) -> None:
        self._frames = frames
        self._left = pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})

    def take(self, rows: int) -> pl.DataFrame:
        """The next rows; fewer where there are no more."""
        found = [self._left.head(rows)]
        self._left = self._left.slice(rows)
        while (missing := rows - sum(frame.height for frame in found)) > 0:
            frame = next(self._frames, None)
            if frame is None:
                break
            frame = frame.select("value", "count")
            found.append(frame.head(missing))
            self._left = frame.slice(missing)
        return pl.concat(found)


def _cut_earlier(
    info: DatasetInfo, feature: CategoricalFeature, partitions: int, scratch: Path
) -> list[Path]:
    """An earlier vocabulary, checked and cut by the hash of its values."""
    path = info.folder / feature.vocabulary
    record = info.checksums.get(feature.vocabulary)
    files = [scratch / f"earlier-{partition:05d}.arrow" for partition in range(partitions)]
    schema = pa.schema([SCHEMA.field(name) for name in ("id", "value", "decayed", "idle")])
    try:
        if record is not None and sha256_of_file(path) != record.sha256:
            raise DataError(f"{path} was changed since it was written; {_WAY_OUT}")
        with ExitStack() as stack:
            writers = [
                stack.enter_context(pa.ipc.new_file(stack.enter_context(file.open("wb")), schema))
                for file in files
            ]
            for frame in _earlier_frames(path, feature):
                for part, writer in zip(cut_by_hash(frame, partitions), writers):
                    table = part.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)
                    writer.write_table(table)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}; {_WAY_OUT}") from None
    return files


_WAY_OUT = "copy the dataset again, or prepare it anew"


def _earlier_frames(path: Path, feature: CategoricalFeature) -> Iterator[pl.DataFrame]:
    """The rows of an earlier vocabulary; one of a dataset that stood for itself was just seen."""
    with pq.ParquetFile(arrow_input(path), page_checksum_verification=True) as file:
        names = [name for name in SCHEMA.names if name in file.schema_arrow.names]
        absent = {"id", "value", "count"} - set(names)
        if absent:
            raise DataError(f"{path} has no column {min(absent)!r}; {_WAY_OUT}")
        for batch in batches_of(file, _AT_ONCE, names):
            frame = pl.DataFrame(pa.Table.from_batches([batch]))
            if "decayed" not in names:
                frame = frame.with_columns(pl.col("count").cast(pl.Float64).alias("decayed"))
            if "idle" not in names:
                frame = frame.with_columns(pl.lit(0, dtype=pl.Int32).alias("idle"))
            _check_earlier(path, feature, frame)
            yield frame.select("id", "value", "decayed", "idle")


def _check_earlier(path: Path, feature: CategoricalFeature, frame: pl.DataFrame) -> None:
    wrong = (
        ("an id", ~pl.col("id").is_between(FIRST_ID, feature.num_embeddings - 1)),
        ("a value", pl.col("value").is_null()),
        ("a count", pl.col("count") < 0),
        ("a decayed count", (pl.col("decayed") < 0) | ~pl.col("decayed").is_finite()),
        ("a number of datasets unseen", pl.col("idle") < 0),
    )
    for what, expression in wrong:
        odd = frame.filter(expression.fill_null(True))
        if odd.height:
            raise DataError(
                f"{path}: {what} of {feature.name!r} cannot be: {odd.row(0, named=True)}; {_WAY_OUT}"
            )


def _refuse_twice(
    info: DatasetInfo, feature: CategoricalFeature, frame: pl.DataFrame, column: str
) -> None:
    twice = frame.filter(pl.col(column).is_duplicated())
    if twice.height:
        raise DataError(
            f"{info.folder / feature.vocabulary} holds the {column} {twice[column].min()!r} of "
            f"{feature.name!r} twice; {_WAY_OUT}"
        )
