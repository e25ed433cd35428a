"""From a value to its id: a compact hash index over a slice of a vocabulary.

Building a join's hash table again for every block would cost time in the size of the vocabulary,
so the index is built once: 64-bit hashes of the values in order, found through their leading bits.
It takes about 16 bytes a value instead of the text itself. No two values of an index share a hash
(building checks it), so seen values always get their own id; a value that the train split lacks is
taken for a seen one with probability vocabulary / 2^64, 5e-13 for ten million values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from embcomp.data_pipelines.schema import MISSING_ID, UNSEEN_ID
from embcomp.errors import DataError

BYTES_PER_VALUE = 32
"""An upper bound of what an index takes while it is built."""
_SEEDS = 4


class ValueIndex:
    """Ids of the vocabulary rows `start` <= row < `stop`; every other value gets id 1."""

    def __init__(self, vocabulary: Path, start: int, stop: int) -> None:
        for seed in range(_SEEDS):
            self._seed = seed
            hashes = np.empty(stop - start, dtype=np.uint64)
            ids = np.empty(stop - start, dtype=np.int32)
            at = 0
            for frame in _slices(vocabulary, start, stop):
                hashes[at : at + frame.height] = frame["value"].hash(seed).to_numpy()
                ids[at : at + frame.height] = frame["id"].to_numpy()
                at += frame.height
            order = np.argsort(hashes)
            self._keys = hashes[order]
            self._ids = ids[order]
            if not (self._keys[1:] == self._keys[:-1]).any():
                break
        else:
            raise DataError(f"{vocabulary} holds values twice")
        bits = max(1, int(np.ceil(np.log2(max(2, len(self._keys))))))
        self._shift = np.uint64(64 - bits)
        counts = np.bincount((self._keys >> self._shift).astype(np.int64), minlength=1 << bits)
        self._starts = np.zeros((1 << bits) + 1, dtype=np.int32)
        np.cumsum(counts, out=self._starts[1:])

    def ids(self, values: pl.Series) -> np.ndarray:
        """Return the (N,) int32 ids of N values (String); a null gets id 0."""
        hashes = values.hash(self._seed).to_numpy()
        found = np.full(len(hashes), UNSEEN_ID, dtype=np.int32)
        slots = (hashes >> self._shift).astype(np.int64)
        at, end = self._starts[slots], self._starts[slots + 1]
        left = np.flatnonzero(at < end)
        at, end, wanted = at[left], end[left], hashes[left]
        while len(left):
            hit = self._keys[at] == wanted
            found[left[hit]] = self._ids[at[hit]]
            go_on = ~hit & (at + 1 < end)
            left, at, end, wanted = left[go_on], at[go_on] + 1, end[go_on], wanted[go_on]
        if values.null_count():
            found[values.is_null().to_numpy()] = MISSING_ID
        return found


def _slices(vocabulary: Path, start: int, stop: int) -> Iterator[pl.DataFrame]:
    file = pq.ParquetFile(vocabulary)
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        low, high = max(start - first, 0), min(stop - first, rows)
        if low < high:
            frame = pl.from_arrow(file.read_row_group(group, columns=["id", "value"]))
            assert isinstance(frame, pl.DataFrame)
            yield frame.slice(low, high - low)
        first += rows
