"""Which row of an earlier run a row begins with, once ids are those of another dataset.

What is known of ids and of rows is as long as a table, so it is read by range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp.layers.block_work import IN_MEMORY, RowBlock, Work, add_up, row_blocks, rows_averaged
from embcomp.layers.row_sources import ComputedRows, RowSource

_COLUMNS = 2  # of 4 bytes that a number of an id takes


@dataclass(frozen=True, kw_only=True)
class FollowedIds:
    """Where the ids of a table come from.

    Attributes:
        before: (num_embeddings,) int64 the id whose row each begins with: the earlier id of the same
            value, for new values perhaps one that stands for them, else -1.
        fresh: (num_embeddings,) bool which ids have no earlier one of their own.
        has_value: (num_embeddings,) bool which ids are in use.
        counts: (earlier num_embeddings,) float64 how often each earlier id occurred: whole numbers.
    """

    before: RowSource
    fresh: RowSource
    has_value: RowSource
    counts: RowSource

    @property
    def earlier(self) -> int:
        """How many ids the earlier table had."""
        return len(self.counts)

    @property
    def has_open(self) -> bool:
        """Whether an id begins with nobody's row."""
        return _has_open(self.before)


@dataclass(frozen=True, kw_only=True)
class RowMove:
    """Where the rows of a physical table come from.

    Attributes:
        rows: (rows,) int64 the earlier row that each begins with; -1 for the mean of all.
        fresh: (rows,) bool which begin without what an optimizer knew of a row.
        weights: (earlier rows,) float64 what each counts in the mean.
    """

    rows: RowSource
    fresh: RowSource
    weights: RowSource

    @classmethod
    def of_ids(cls, ids: FollowedIds) -> RowMove:
        """The move of a table that has a row for each id."""
        return cls(rows=ids.before, fresh=ids.fresh, weights=ids.counts)

    def moved(self, rows: RowSource, work: Work = IN_MEMORY, name: str = "moved") -> RowSource:
        """Rows as they begin.

        Args:
            rows: the earlier ones.
            work: finds the mean row, where one begins with it.
            name: unique among all calls of a stage.
        """
        mean = _mean(rows, self.weights, work, name) if _has_open(self.rows) else None

        def read(start: int, stop: int) -> Tensor:
            own = self.rows.read(start, stop)
            found = taken(rows, own.clamp(min=0))
            if mean is not None:
                found[own < 0] = mean
            return found

        return ComputedRows((len(self.rows), *rows.shape[1:]), rows.dtype, read, of=[rows])

    def moved_state(self, state: RowSource) -> RowSource:
        """What an optimizer knows of the rows; zeros, as of no step, where they are fresh.

        Args:
            state: what it knew, row by row.
        """

        def read(start: int, stop: int) -> Tensor:
            own, fresh = self.rows.read(start, stop), self.fresh.read(start, stop)
            found = taken(state, own.clamp(min=0))
            found[fresh | (own < 0)] = 0
            return found

        return ComputedRows((len(self.rows), *state.shape[1:]), state.dtype, read, of=[state])


def taken(rows: RowSource, places: Tensor) -> Tensor:
    """Rows by their numbers, in any order and perhaps several times; a copy.

    Args:
        rows: the rows.
        places: (n,) int64.
    """
    if len(places) and bool((places.diff() == 1).all()):
        return rows.read(int(places[0]), int(places[-1]) + 1).clone()
    ids, back = torch.unique(places, return_inverse=True)
    return rows.take(ids)[back]


def _has_open(rows: RowSource) -> bool:
    blocks = row_blocks("", len(rows), _COLUMNS)
    return any(bool((rows.read(block.start, block.stop) < 0).any()) for block in blocks)


def _mean(rows: RowSource, weights: RowSource, work: Work, name: str) -> Tensor:
    """The mean row, by weights; by nothing where all are zero."""
    size = rows_averaged(rows)
    blocks = [
        RowBlock(table=name, start=start, stop=min(start + size, len(rows)))
        for start in range(0, len(rows), size)
    ]

    def sums(block: RowBlock) -> Mapping[str, Tensor]:
        own = weights.read(block.start, block.stop)
        part = rows.read(block.start, block.stop).double()
        return {
            "weight": own.sum(),
            "weighted": torch.tensordot(own, part, dims=1),
            "plain": torch.tensordot(torch.ones_like(own), part, dims=1),
        }

    found = add_up(work, f"{name}-mean", sums, blocks)
    total, weight = found["weighted"], float(found["weight"])
    if not weight:
        total, weight = found["plain"], float(len(rows))
    return (total / weight).to(rows.dtype)
