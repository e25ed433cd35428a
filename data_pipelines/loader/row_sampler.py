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
    epoch when `shuffle` is set. A step takes `batch_size * world_size` rows, the same ones on any
    number of ranks that share them: the sequence is cut into windows of whole steps, and

    - in order, a step takes the next rows, of which each rank has its share;
    - shuffled, a window is cut into as many lanes as a step has rows, and each step takes one row of
      every lane, whose rows come in a drawn order. A rank has some neighbouring lanes, which are one
      range of the window, so it decodes its own share only. Each row is equally likely in each step.

    With `in_ranges`, which is for evaluations in order, a rank takes one range of the whole sequence,
    so that it decodes its own share only; which rows meet in a step then depends on the ranks.

    Every draw is a function of the seed, the epoch and its place alone, so any step can be found
    without going through those before it. Without `drop_last` the last step is smaller; where its rows
    do not divide, a rank's last row is another rank's, not to be counted.
    """

    sizes: NDArray[np.int64]
    batch_size: int
    window: int
    rank: int
    world_size: int
    shuffle: bool
    drop_last: bool
    seed: int
    in_ranges: bool = False

    @property
    def step_rows(self) -> int:
        """How many rows of all ranks a whole step takes."""
        return self.batch_size * self.world_size

    @property
    def rows(self) -> int:
        """How many rows of all ranks an epoch takes."""
        total = int(self.sizes.sum())
        return total // self.step_rows * self.step_rows if self.drop_last else total

    @property
    def num_steps(self) -> int:
        """Steps of an epoch, a short last one included."""
        return -(-self.rows // self.step_rows)

    @property
    def steps_per_window(self) -> int:
        """Steps of every window but the last."""
        return self.window // self.step_rows

    @property
    def num_windows(self) -> int:
        """Windows of an epoch, a short last one included."""
        return -(-self.rows // self.window)

    def window_size(self, window: int) -> int:
        """How many rows this rank takes from a window, the uncounted one included."""
        whole, rest = divmod(self._window_rows(window), self.step_rows)
        return whole * self.batch_size + -(-rest // self.world_size)

    def num_valid(self, window: int) -> int:
        """How many of them count."""
        if self.in_ranges:
            start = window * self.steps_per_window * self.batch_size
            first, last = self._own(self.rows)
            return min(self.window_size(window), last - first - start)
        first, last = self._own(self._window_rows(window))
        return last - first

    def sequence(self, epoch: int) -> NDArray[np.int64]:
        """The row groups in this epoch's order; the same on every rank."""
        if not self.shuffle:
            return np.arange(len(self.sizes))
        return self._rng(epoch, 0).permutation(len(self.sizes))

    def pieces(self, epoch: int, window: int) -> Iterator[Piece]:
        """The parts of row groups that make up this rank's rows of a window, in sequence."""
        sequence = self.sequence(epoch)
        ends = np.cumsum(self.sizes[sequence])
        for start, stop in self._ranges(window):
            place = int(np.searchsorted(ends, start, side="right"))
            while start < stop:
                group = int(sequence[place])
                begin = int(ends[place] - self.sizes[group])
                end = min(stop, int(ends[place]))
                if start < end:
                    yield Piece(group, start - begin, end - begin)
                start, place = max(start, end), place + 1

    def permutation(self, epoch: int, window: int) -> NDArray[np.int64] | None:
        """The order of this rank's rows of a window, or None when they stay as they are."""
        if not self.shuffle:
            return None
        rows = self._window_rows(window)
        first, last = self._own(rows)
        lanes = np.arange(self.rank * self.batch_size, (self.rank + 1) * self.batch_size + 1)
        bounds = lanes * rows // self.step_rows - first
        starts, lengths = bounds[:-1], np.diff(bounds)
        # All ranks draw for the whole window, so that a row's number does not depend on them.
        drawn = self._rng(epoch, 1, window).random(rows)[first:last]
        drawn += np.repeat(np.arange(self.batch_size), lengths)
        order = np.argsort(drawn, kind="stable")  # lane after lane
        whole = rows // self.step_rows
        steps = [order[starts + step] for step in range(whole)]
        steps.append(order[starts[lengths > whole] + whole])
        uncounted = np.arange(last - first, self.window_size(window))
        return np.concatenate([*steps, uncounted])

    def _ranges(self, window: int) -> Iterator[tuple[int, int]]:
        """This rank's rows of a window as ranges of the sequence, the uncounted one included."""
        size, start = self.window_size(window), window * self.window
        if self.in_ranges:
            first = self._own(self.rows)[0] + window * self.steps_per_window * self.batch_size
            yield first, first + size
        elif self.shuffle or self.world_size == 1:
            first = start + self._own(self._window_rows(window))[0]
            yield first, first + size
        else:
            whole, rest = divmod(self._window_rows(window), self.step_rows)
            for step in range(start, start + whole * self.step_rows, self.step_rows):
                yield step + self.rank * self.batch_size, step + (self.rank + 1) * self.batch_size
            if rest:
                first = start + whole * self.step_rows + self._own(rest)[0]
                yield first, first + -(-rest // self.world_size)

    def _window_rows(self, window: int) -> int:
        """The rows of all ranks in a window."""
        return min(self.window, self.rows - window * self.window)

    def _own(self, rows: int) -> tuple[int, int]:
        """Which of so many rows are this rank's."""
        return (
            self.rank * rows // self.world_size,
            (self.rank + 1) * rows // self.world_size,
        )

    def _rng(self, *place: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, *place])))
