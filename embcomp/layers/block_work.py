"""Work on tables block by block: the same lines on every rank, the same results on any number of them.

A block has so many rows that it takes about 4 MiB, which follows from the width alone. So sums are made
in the same order whatever the ranks and the memory. A method writes down what is done for a block;
a `Work` says who does it and where the results are: here in memory, in a run in files
(`embcomp.training.stages.folder_work`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from embcomp.layers.row_sources import MemoryRows, RowSource

BLOCK_BYTES = 4 << 20
"""About what a block of fp32 rows takes."""
LEAST_ROWS = 256
"""Of a block; all blocks but a table's last have a multiple of it."""
_ROWS_AVERAGED = 1 << 16

Item = TypeVar("Item")
Statistics = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """A range of a table's rows.

    Attributes:
        table: the table's name.
        start: the first row.
        stop: the one after the last.
    """

    table: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """The range."""
        return slice(self.start, self.stop)


def block_rows(columns: int) -> int:
    """Rows of a block of a table of so many columns: a power of two, at least 256."""
    rows = max(LEAST_ROWS, BLOCK_BYTES // (4 * max(1, columns)))
    return 1 << (rows.bit_length() - 1)


def rows_averaged(rows: RowSource) -> int:
    """Rows that are added up together in float64: 65,536, or as many as take 64 MiB then, at least 256.

    Args:
        rows: what is averaged.
    """
    columns = torch.Size(rows.shape[1:]).numel()
    most = max(LEAST_ROWS, 16 * BLOCK_BYTES // (max(1, columns) * (rows.dtype.itemsize + 8)))
    return min(_ROWS_AVERAGED, 1 << (most.bit_length() - 1))


def row_blocks(
    table: str, rows: int, columns: int, *, start: int = 0, stop: int | None = None
) -> list[RowBlock]:
    """The blocks of a table.

    Args:
        table: its name.
        rows: its length.
        columns: its width.
        start: the first row that matters.
        stop: the one after the last that matters.
    """
    size, end = block_rows(columns), rows if stop is None else stop
    bounds = [*range(start, end, size), end]
    return [RowBlock(table=table, start=a, stop=b) for a, b in pairwise(bounds)]


class Work(Protocol):
    """Who does what; every rank makes the same calls in the same order."""

    def map(
        self, name: str, function: Callable[[Item], Statistics], items: Sequence[Item]
    ) -> Iterator[Statistics]:
        """Small results of a function, in the order of the items, once all ranks have done theirs.

        Args:
            name: unique among all calls of a stage.
            function: of an item alone, called for it on one of the ranks.
            items: blocks, or anything else whose `repr` tells it from others.
        """

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
        """A tensor whose consecutive parts a function makes, for what may be as long as a table.

        Args:
            name: unique among all calls of a stage.
            function: of an item alone, called for it on one of the ranks.
            items: blocks, or anything else whose `repr` tells it from others.
            shape: of the whole tensor.
            dtype: of the whole tensor.
            sizes: rows that each item makes; as many as it has by default.
        """


def add_up(
    work: Work, name: str, function: Callable[[Item], Statistics], items: Sequence[Item]
) -> dict[str, Tensor]:
    """The sums of what a function gives, added in the order of the items.

    Args:
        work: does it.
        name: unique among all calls of a stage.
        function: of an item alone; its tensors are alike for all items.
        items: at least one.
    """
    totals: dict[str, Tensor] = {}
    for found in work.map(name, function, items):
        for key, value in found.items():
            totals[key] = totals[key] + value if key in totals else value
    return totals


def part_sizes(
    name: str, items: Sequence[Any], shape: Sequence[int], sizes: Sequence[int] | None
) -> list[int]:
    """The rows that each item of a `Work.write` makes; see there. Together they are all of the tensor's."""
    own = [len(item) for item in items] if sizes is None else list(sizes)
    assert sum(own) == shape[0], f"{name}: {sum(own)} rows, {shape[0]} were announced"
    return own


class NamedWork:
    """Work whose steps have a name of their own before them, where several have the same ones.

    Args:
        work: does it.
        name: unique.
    """

    def __init__(self, work: Work, name: str) -> None:
        self._work, self._name = work, name

    def map(
        self, name: str, function: Callable[[Item], Statistics], items: Sequence[Item]
    ) -> Iterator[Statistics]:
        """As `Work.map`."""
        return self._work.map(f"{self._name}-{name}", function, items)

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
        """As `Work.write`."""
        return self._work.write(f"{self._name}-{name}", function, items, shape, dtype, sizes=sizes)


class MemoryWork:
    """All is done here and at once, and what is written stays in memory."""

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
        """The tensor that the parts make."""
        whole, start = torch.empty(tuple(shape), dtype=dtype), 0
        for part in map(function, items):
            whole[start : start + len(part)] = part
            start += len(part)
        assert start == len(whole), f"{name}: {start} rows came, {len(whole)} were announced"
        return MemoryRows(whole)


IN_MEMORY = MemoryWork()
