"""The largest of very many values, found by histograms that are refined until they are exact.

The values of several tables are ranked together. A histogram over the highest 16 bits of their keys says
in which bin a cut lies, one over the next 16 bits of what is in that bin where in it, and so on: four
passes find the value itself. Equal values come in the order of the tables, then by place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp.layers.block_work import RowBlock, Work, row_blocks
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.budget import largest_int

_BITS = 16
_LEVELS = 64 // _BITS
_ALL = 2**62

Counts = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which values are kept.

    Attributes:
        key: what is above is kept.
        last: by table, the last place whose value is kept though it is no more than that.
        counts: by table, how many values are kept.
    """

    key: int
    last: Mapping[str, int]
    counts: Counts

    @property
    def value(self) -> float:
        """The value of `key`: the largest that is not kept, unless equals of it are."""
        return float(torch.tensor(self.key).view(torch.float64))

    def keeps(self, table: str, values: Tensor, start: int) -> Tensor:
        """Which of some values are kept: a bool of their shape.

        Args:
            table: theirs.
            values: consecutive ones.
            start: the place of the first in its table, counted in values.
        """
        keys = _keys(values)
        places = torch.arange(start, start + values.numel()).view(values.shape)
        ties = (keys == self.key) & (places <= self.last[table])
        return ((keys > self.key) | ties) & (values > -torch.inf)


@dataclass(frozen=True, kw_only=True)
class _Histogram:
    """The values with one prefix of their keys: bins from the largest, (bins, tables) counts."""

    bins: Tensor
    counts: Tensor


class BestValues:
    """Ranks values that are read by range.

    Args:
        work: does a pass over them.
        name: unique in the stage.
        values: by table, (N,) or (N, columns), not negative; those of minus infinity are never kept.
            Tables come in the order in which equal values are kept.
    """

    def __init__(self, work: Work, name: str, values: Mapping[str, RowSource]) -> None:
        self._work, self._name, self._values = work, name, dict(values)
        self._tables = list(values)
        self._blocks = [
            block
            for table, source in values.items()
            for block in row_blocks(table, len(source), source.cost // 4)
        ]
        self._known: dict[tuple[int, ...], _Histogram] = {}
        self._ties: dict[tuple[tuple[int, ...], str], list[int]] = {}

    @property
    def most(self) -> int:
        """How many there are that may be kept."""
        return int(self._histogram(()).counts.sum())

    def cut(self, fits: Callable[[Counts], bool]) -> Cut | None:
        """Keep as many of the best as fit; None where not even their absence does.

        Args:
            fits: whether so many values of each table do; where more fit, fewer do.
        """
        above = torch.zeros(len(self._tables), dtype=torch.int64)
        if not fits(self._named(above)):
            return None
        prefix: tuple[int, ...] = ()
        for _ in range(_LEVELS):
            found = self._histogram(prefix)
            reached = torch.cat([above[None], above + found.counts.cumsum(0)])
            fitting = largest_int(
                lambda n, reached=reached: fits(self._named(reached[n])),  # type: ignore[misc]
                0,
                len(found.bins),
            )
            assert fitting is not None
            above = reached[fitting]
            if fitting == len(found.bins):
                assert not prefix, "what fits whole is kept whole"
                return Cut(key=-1, last=dict.fromkeys(self._tables, -1), counts=self._named(above))
            prefix = (*prefix, int(found.bins[fitting]))
            ties = found.counts[fitting]
        return self._with_ties(fits, prefix, above, ties)

    def kept(self, cut: Cut) -> dict[str, RowSource]:
        """By table, a bool for each value whether it is kept, read by range."""

        def mask(table: str, values: RowSource) -> RowSource:
            each = torch.Size(values.shape[1:]).numel()
            return ComputedRows(
                values.shape,
                torch.bool,
                lambda a, b: cut.keeps(table, values.read(a, b), a * each),
                of=[values],
            )

        return {table: mask(table, values) for table, values in self._values.items()}

    def _named(self, counts: Tensor) -> Counts:
        return dict(zip(self._tables, counts.tolist()))

    def _histogram(self, prefix: tuple[int, ...]) -> _Histogram:
        if prefix not in self._known:
            self._known[prefix] = self._count(prefix)
        return self._known[prefix]

    def _count(self, prefix: tuple[int, ...]) -> _Histogram:
        """One pass over all values."""
        level, wanted = len(prefix), _joined(prefix)
        shift = 64 - _BITS * (level + 1)

        def count(block: RowBlock) -> dict[str, Tensor]:
            values = self._values[block.table].read(block.start, block.stop)
            keys = _keys(values[values > -torch.inf])
            if prefix:
                keys = keys[(keys >> (shift + _BITS)) == wanted]
            counts = torch.bincount((keys >> shift) & ((1 << _BITS) - 1), minlength=1 << _BITS)
            bins = counts.nonzero()[:, 0]
            return {"bins": bins, "counts": counts[bins]}

        name = "-".join([self._name, "histogram", *map(str, prefix)])
        totals = torch.zeros(1 << _BITS, len(self._tables), dtype=torch.int64)
        for block, found in zip(self._blocks, self._work.map(name, count, self._blocks)):
            totals[found["bins"], self._tables.index(block.table)] += found["counts"]
        bins = totals.any(1).nonzero()[:, 0].flip(0)
        return _Histogram(bins=bins, counts=totals[bins])

    def _with_ties(
        self, fits: Callable[[Counts], bool], prefix: tuple[int, ...], above: Tensor, ties: Tensor
    ) -> Cut:
        """The cut among equal values."""
        total = int(ties.sum())
        fitting = largest_int(lambda n: fits(self._named(above + _first(ties, n))), 0, total)
        assert fitting is not None
        kept = _first(ties, fitting)
        last = {}
        for table, number, of in zip(self._tables, kept.tolist(), ties.tolist()):
            last[table] = -1 if not number else _ALL
            if 0 < number < of:
                last[table] = self._place_of_tie(prefix, table, number)
        return Cut(key=_joined(prefix), last=last, counts=self._named(above + kept))

    def _place_of_tie(self, prefix: tuple[int, ...], table: str, number: int) -> int:
        """Where a table's n-th value of a key is."""
        key, source = _joined(prefix), self._values[table]
        own = [block for block in self._blocks if block.table == table]

        def ties(block: RowBlock) -> Tensor:
            values = source.read(block.start, block.stop)
            return ((_keys(values) == key) & (values > -torch.inf)).reshape(-1)

        if (prefix, table) not in self._ties:
            name = "-".join([self._name, "ties", *map(str, prefix), table])
            found = self._work.map(name, lambda block: {"count": ties(block).sum()}, own)
            self._ties[prefix, table] = [int(each["count"]) for each in found]
        for block, count in zip(own, self._ties[prefix, table]):
            if number <= count:
                each = torch.Size(source.shape[1:]).numel()
                return block.start * each + int(ties(block).nonzero()[number - 1])
            number -= count
        raise AssertionError("there are as many ties as the histogram has")


def _keys(values: Tensor) -> Tensor:
    """Integers that are ordered as values that are not negative."""
    return values.to(torch.float64).view(torch.int64)


def _joined(prefix: Sequence[int]) -> int:
    key = 0
    for part in prefix:
        key = (key << _BITS) | part
    return key


def _first(ties: Tensor, number: int) -> Tensor:
    """How many of the first so many ties are each table's."""
    before = ties.cumsum(0) - ties
    return (number - before).clamp(min=0).minimum(ties)
