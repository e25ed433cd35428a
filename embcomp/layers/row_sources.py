"""Rows that are read by range, wherever they lie: in memory, in files, or made when they are asked for.

A table may be larger than what a process holds. So what works on rows takes a `RowSource` and reads
ranges of it; `whole` is for what is known to be small.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from typing_extensions import override

_AT_ONCE = 4 << 20  # bytes that `whole` and `take` read together, those of what it is made from
_DENSE = 8  # of so many rows one is wanted: then they are read together


class RowSource(ABC):
    """A tensor that is read by ranges of its first axis.

    Attributes:
        shape: as of a tensor.
        dtype: of its elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = tuple(shape), dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        return columns * self.dtype.itemsize

    @property
    def cost(self) -> int:
        """Bytes that are in memory for a row while it is read."""
        return self.row_bytes

    @property
    def _at_once(self) -> int:
        return max(1, _AT_ONCE // max(1, self.cost))

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, on the CPU; nobody writes into them.

        Args:
            start: the first.
            stop: the one after the last.
        """

    def take(self, ids: Tensor) -> Tensor:
        """Rows by their numbers, on the CPU.

        Args:
            ids: (n,) int64, rising.
        """
        found = torch.empty((len(ids), *self.shape[1:]), dtype=self.dtype)
        done = 0
        while done < len(ids):
            first = int(ids[done])
            end = int(torch.searchsorted(ids, first + self._at_once))
            own = ids[done:end]
            last = int(own[-1]) + 1
            if last - first <= _DENSE * len(own):
                found[done:end] = self.read(first, last)[own - first]
            else:
                for place, row in enumerate(own.tolist(), done):
                    found[place] = self.read(row, row + 1)[0]
            done = end
        return found

    def whole(self) -> Tensor:
        """All rows, in memory."""
        found = torch.empty(self.shape, dtype=self.dtype)
        for start in range(0, len(self), self._at_once):
            stop = min(start + self._at_once, len(self))
            found[start:stop] = self.read(start, stop)
        return found

    def range(self, start: int, stop: int) -> RowSource:
        """The rows from `start` to `stop` as a source of their own."""
        return self if (start, stop) == (0, len(self)) else _Range(self, start, stop)

    def split(self, sizes: Sequence[int]) -> list[RowSource]:
        """Consecutive parts of these sizes, as `Tensor.split` gives them."""
        ends = list(accumulate(sizes))
        assert ends[-1:] in ([], [len(self)]), "parts are all of it"
        return [self.range(stop - size, stop) for size, stop in zip(sizes, ends)]

    def first_columns(self, count: int) -> RowSource:
        """The first columns of each row."""
        if count == self.shape[1]:
            return self
        shape = (len(self), count)
        return ComputedRows(shape, self.dtype, lambda a, b: self.read(a, b)[:, :count], of=[self])


class MemoryRows(RowSource):
    """A tensor in memory; what is read are views of it.

    Args:
        tensor: on the CPU, or anywhere if what is read may be there.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype)
        self.tensor = tensor

    @override
    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]

    @override
    def take(self, ids: Tensor) -> Tensor:
        return self.tensor[ids]

    @override
    def whole(self) -> Tensor:
        return self.tensor

    @override
    def range(self, start: int, stop: int) -> RowSource:
        return MemoryRows(self.tensor[start:stop])

    @override
    def first_columns(self, count: int) -> RowSource:
        return MemoryRows(self.tensor[:, :count])


class ComputedRows(RowSource):
    """Rows that a function makes whenever they are read.

    Args:
        shape: of the whole.
        dtype: of the elements.
        function: makes the rows from its first argument to its second; each as in any other range.
        of: what it reads.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        function: Callable[[int, int], Tensor],
        *,
        of: Sequence[RowSource] = (),
    ) -> None:
        super().__init__(shape, dtype)
        self._function = function
        self._cost = max([self.row_bytes, *(source.cost for source in of)])

    @property
    @override
    def cost(self) -> int:
        return self._cost

    @override
    def read(self, start: int, stop: int) -> Tensor:
        return self._function(start, stop)


class JoinedRows(RowSource):
    """Sources one after another.

    Args:
        parts: at least one, alike but for their lengths.
    """

    def __init__(self, parts: Sequence[RowSource]) -> None:
        rows = sum(len(part) for part in parts)
        super().__init__((rows, *parts[0].shape[1:]), parts[0].dtype)
        self._cost = max(part.cost for part in parts)
        self._parts = [part for part in parts if len(part)]
        self._starts = [0, *accumulate(len(part) for part in self._parts)]

    @property
    @override
    def cost(self) -> int:
        return self._cost

    @override
    def read(self, start: int, stop: int) -> Tensor:
        if start >= stop:
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        place, found = bisect_right(self._starts, start) - 1, []
        for part, (low, high) in zip(
            self._parts[place:], pairwise(self._starts[place:]), strict=True
        ):
            if low >= stop:
                break
            found.append(part.read(max(start, low) - low, min(stop, high) - low))
        return found[0] if len(found) == 1 else torch.cat(found)


class _Range(RowSource):
    def __init__(self, source: RowSource, start: int, stop: int) -> None:
        super().__init__((stop - start, *source.shape[1:]), source.dtype)
        self._source, self._start = source, start

    @property
    @override
    def cost(self) -> int:
        return self._source.cost

    @override
    def read(self, start: int, stop: int) -> Tensor:
        return self._source.read(self._start + start, self._start + stop)

    @override
    def take(self, ids: Tensor) -> Tensor:
        return self._source.take(ids + self._start)


def as_rows(rows: Tensor | RowSource) -> RowSource:
    """A source of rows, which a tensor becomes."""
    return MemoryRows(rows) if isinstance(rows, Tensor) else rows
