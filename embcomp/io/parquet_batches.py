"""The rows of a Parquet file, some at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def batches_of(
    file: pq.ParquetFile, size: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield up to `size` rows at a time; of a file without row groups nothing, where old pyarrow raises.

    Args:
        file: open.
        size: rows of a batch, at most.
        columns: those that are wanted; None for all.
    """
    if file.num_row_groups:
        yield from file.iter_batches(
            batch_size=size, columns=None if columns is None else list(columns)
        )
