"""Work whose long results are made when they are read: nothing as long as a table is in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from embcomp.layers.block_work import Item, Statistics, part_sizes
from embcomp.layers.row_sources import RowSource


class LazyWork:
    """Small results are made at once, and what is written is made again for every reading.

    For what is read once, in order, as when tables are exported.
    """

    def map(
        self, name: str, function: Callable[[Item], Statistics], items: Sequence[Item]
    ) -> Iterator[Statistics]:
        """Results of a function, one after another."""
        return (function(item) for item in items)

    def write(
        self,
        name: str,
        function: Callable[[Any], Tensor],
        items: Sequence[Any],
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        sizes: Sequence[int] | None = None,
    ) -> RowSource:
        """The rows that the parts make, of which one is kept at a time."""
        own = part_sizes(name, items, shape, sizes)
        return _PartRows(shape, dtype, function, items, own)


LAZY = LazyWork()


class _PartRows(RowSource):
    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        function: Callable[[Any], Tensor],
        items: Sequence[Any],
        sizes: Sequence[int],
    ) -> None:
        super().__init__(shape, dtype)
        full = [(item, size) for item, size in zip(items, sizes) if size]
        self._function = function
        self._items = [item for item, _ in full]
        self._starts = [0, *accumulate(size for _, size in full)]
        self._last: tuple[int, Tensor] | None = None

    @override
    def read(self, start: int, stop: int) -> Tensor:
        found: list[Tensor] = []
        place = bisect_right(self._starts, start) - 1
        while start < stop:
            low, high = self._starts[place : place + 2]
            found.append(self._part(place)[start - low : min(stop, high) - low])
            start, place = min(stop, high), place + 1
        if not found:
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _part(self, place: int) -> Tensor:
        if self._last is None or self._last[0] != place:
            self._last = (place, self._function(self._items[place]).to(self.dtype))
        return self._last[1]
