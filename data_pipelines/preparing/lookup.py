"""From a value to its id: a compact hash index over a slice of a vocabulary.

Building a join's hash table again for every block would cost time in the size of the vocabulary,
so the index is built once: 64-bit hashes of the values, in buckets by their leading bits. It takes
20 to 28 bytes a value instead of the text itself. No two values of an index share a hash
(building checks it), so seen values always get their own id; a value that the train split lacks is
taken for a seen one with probability vocabulary / 2^64, 5e-13 for ten million values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from embcomp.data_pipelines.preparing.text_hash import hash_texts
from embcomp.data_pipelines.schema import FIRST_ID, LARGEST_ID, MISSING_ID, UNSEEN_ID
from embcomp.errors import DataError
from embcomp.io.remote_paths import arrow_input

BYTES_PER_VALUE = 52
"""An upper bound of what an index takes while it is built."""
_SEEDS = 4
HASH_SEED = 31
"""Of ids that are hashes: another one than indices and partitions take."""


class ValueIndex:
    """Ids of the vocabulary rows `start` <= row < `stop`; every other value gets id 1."""

    def __init__(self, vocabulary: Path, start: int, stop: int) -> None:
        for seed in range(_SEEDS):
            self._seed = seed
            hashes = np.empty(stop - start, dtype=np.uint64)
            ids = np.empty(stop - start, dtype=np.int32)
            at = 0
            for frame in _slices(vocabulary, start, stop):
                hashes[at : at + frame.height] = hash_texts(frame["value"], seed)
                ids[at : at + frame.height] = frame["id"].to_numpy()
                at += frame.height
            ordered = np.sort(hashes)
            if not (ordered[1:] == ordered[:-1]).any():
                break
        else:
            raise DataError(f"{vocabulary} holds values twice")
        del ordered
        # Half as full as it could be, a bucket mostly holds one value; the most frequent of a
        # bucket comes first, as ids ascend with rarity and the sort is stable.
        bits = int(np.ceil(np.log2(max(2, 2 * len(hashes)))))
        self._shift = np.uint64(64 - bits)
        buckets = (hashes >> self._shift).astype(np.int64)
        # Counted in place, as `bincount` would take 8 bytes for each of up to four buckets a value.
        self._starts = np.zeros((1 << bits) + 1, dtype=np.int32)
        np.add.at(self._starts, buckets + 1, np.int32(1))
        np.cumsum(self._starts, out=self._starts)
        order = np.argsort(buckets, kind="stable")
        del buckets
        # One more entry, for an empty last bucket to point at.
        self._keys = _one_more(hashes, order, 0)
        del hashes
        self._ids = _one_more(ids, order, UNSEEN_ID)

    def ids(self, values: pl.Series) -> np.ndarray:
        """Return the (N,) int32 ids of N values (String); a null gets id 0."""
        hashes = hash_texts(values, self._seed)
        buckets = (hashes >> self._shift).astype(np.int64)
        # An empty bucket points at the next one's value, whose hash cannot be equal.
        at = self._starts[buckets]
        hit = self._keys[at] == hashes
        found = np.where(hit, self._ids[at], np.int32(UNSEEN_ID))
        left = np.flatnonzero(~hit)
        at, end, wanted = at[left] + 1, self._starts[buckets[left] + 1], hashes[left]
        while True:
            go_on = at < end
            left, at, end, wanted = left[go_on], at[go_on], end[go_on], wanted[go_on]
            if not len(left):
                break
            hit = self._keys[at] == wanted
            found[left[hit]] = self._ids[at[hit]]
            at = np.where(hit, end, at + 1)
        if values.null_count():
            found[values.is_null().to_numpy()] = MISSING_ID
        return found


def _one_more(found: np.ndarray, order: np.ndarray, last: int) -> np.ndarray:
    """An array in an order, and an entry behind it."""
    ordered = np.empty(len(found) + 1, dtype=found.dtype)
    np.take(found, order, out=ordered[:-1])
    ordered[-1] = last
    return ordered


class HashedIds:
    """Ids that are hashes of values: every value has one, seen before or not."""

    def ids(self, values: pl.Series) -> np.ndarray:
        """Return the (N,) int32 ids of N values (String); a null gets id 0.

        They are `FIRST_ID + hash_texts(value, HASH_SEED) % (2**31 - FIRST_ID)`, which will not change.
        """
        span = np.uint64(LARGEST_ID + 1 - FIRST_ID)
        found = (hash_texts(values, HASH_SEED) % span + np.uint64(FIRST_ID)).astype(np.int32)
        if values.null_count():
            found[values.is_null().to_numpy()] = MISSING_ID
        return found


def _slices(vocabulary: Path, start: int, stop: int) -> Iterator[pl.DataFrame]:
    file = pq.ParquetFile(arrow_input(vocabulary))
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        low, high = max(start - first, 0), min(stop - first, rows)
        if low < high:
            frame = pl.from_arrow(file.read_row_group(group, columns=["id", "value"]))
            assert isinstance(frame, pl.DataFrame)
            yield frame.slice(low, high - low)
        first += rows
