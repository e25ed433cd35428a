"""Which rows a rank sees, in which order: pure arithmetic on the sizes of row groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a row group."""

    row_group: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class RowSampler:
    """The order of a split's rows over epochs and ranks.

    All rows form one sequence: the row groups one after the other, their order drawn anew in each
    epoch when `shuffle` is set. Each rank takes one range of it, so that a rank decodes its own
    share only. A range is cut into windows of `window` rows (a multiple of the batch size), whose
    rows are permuted when `shuffle` is set. Every draw is a function of the seed, the epoch and its
    place alone, so any step can be found without going through those before it.

    Without `drop_last` the ranges cover every row once and differ by one row at most; a rank that
    is one row short takes the first row of the next rank's range as its last, not to be counted.
    With it, every rank has the same number of whole batches.
    """

    sizes: NDArray[np.int64]
    batch_size: int
    window: int
    rank: int
    world_size: int
    shuffle: bool
    drop_last: bool
    seed: int

    @property
    def rows_per_rank(self) -> int:
        """How many rows each rank takes in an epoch, the uncounted one included."""
        total = int(self.sizes.sum())
        if self.drop_last:
            return total // self.world_size // self.batch_size * self.batch_size
        return -(-total // self.world_size)

    @property
    def num_steps(self) -> int:
        return -(-self.rows_per_rank // self.batch_size)

    @property
    def num_valid(self) -> int:
        """How many rows of this rank count."""
        if self.drop_last:
            return self.rows_per_rank
        total = int(self.sizes.sum())
        start = self.rank * total // self.world_size
        return (self.rank + 1) * total // self.world_size - start

    @property
    def num_windows(self) -> int:
        return -(-self.rows_per_rank // self.window)

    def window_size(self, window: int) -> int:
        return min(self.window, self.rows_per_rank - window * self.window)

    def sequence(self, epoch: int) -> NDArray[np.int64]:
        """The row groups in this epoch's order; the same on every rank."""
        if not self.shuffle:
            return np.arange(len(self.sizes))
        return self._rng(epoch, 0).permutation(len(self.sizes))

    def pieces(self, epoch: int, window: int) -> Iterator[Piece]:
        """The parts of row groups that make up a window, in sequence."""
        sequence = self.sequence(epoch)
        ends = np.cumsum(self.sizes[sequence])
        total = int(self.sizes.sum())
        if self.drop_last:
            first = self.rank * (total // self.world_size)
        else:
            first = self.rank * total // self.world_size
        start = first + window * self.window
        stop = start + self.window_size(window)
        place = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            group = int(sequence[place])
            begin = int(ends[place] - self.sizes[group])
            end = min(stop, int(ends[place]))
            if start < end:
                yield Piece(group, start - begin, end - begin)
            start, place = max(start, end), place + 1

    def permutation(self, epoch: int, window: int) -> NDArray[np.int64] | None:
        """The order of a window's rows, or None when they stay as they are."""
        if not self.shuffle:
            return None
        size = self.window_size(window)
        counted = min(size, self.num_valid - window * self.window)
        order = np.arange(size)
        order[:counted] = self._rng(epoch, 1, self.rank, window).permutation(counted)
        return order

    def _rng(self, *place: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, *place])))
