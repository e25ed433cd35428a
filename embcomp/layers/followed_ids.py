"""Which row of an earlier run a row begins with, once ids are those of another dataset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp.layers.row_sources import ComputedRows, RowSource

_AT_ONCE = 1 << 16  # rows that are averaged together


@dataclass(frozen=True, kw_only=True)
class FollowedIds:
    """Where the ids of a table come from.

    Attributes:
        before: (num_embeddings,) int64 the id whose row each begins with: the earlier id of the same
            value, for new values perhaps one that stands for them, else -1.
        fresh: (num_embeddings,) bool which ids have no earlier one of their own.
        has_value: (num_embeddings,) bool which ids are in use.
        counts: (earlier num_embeddings,) float64 how often each earlier id occurred.
    """

    before: Tensor
    fresh: Tensor
    has_value: Tensor
    counts: Tensor

    @property
    def earlier(self) -> int:
        """How many ids the earlier table had."""
        return len(self.counts)

    @property
    def keep_numbers(self) -> bool:
        """Whether every value that was known before has the number that it had."""
        own = ~self.fresh
        return bool((self.before[own] == torch.nonzero(own)[:, 0]).all())


@dataclass(frozen=True, kw_only=True)
class RowMove:
    """Where the rows of a physical table come from.

    Attributes:
        rows: (rows,) int64 the earlier row that each begins with; -1 for the mean of all.
        fresh: (rows,) bool which begin without what an optimizer knew of a row.
        weights: (earlier rows,) float64 what each counts in the mean.
    """

    rows: Tensor
    fresh: Tensor
    weights: Tensor

    @classmethod
    def of_ids(cls, ids: FollowedIds) -> RowMove:
        """The move of a table that has a row for each id."""
        return cls(rows=ids.before, fresh=ids.fresh, weights=ids.counts)

    def moved(self, rows: RowSource) -> RowSource:
        """Rows as they begin.

        Args:
            rows: the earlier ones.
        """
        mean = _mean(rows, self.weights) if bool((self.rows < 0).any()) else None

        def read(start: int, stop: int) -> Tensor:
            own = self.rows[start:stop]
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
            own, fresh = self.rows[start:stop], self.fresh[start:stop]
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


def _mean(rows: RowSource, weights: Tensor) -> Tensor:
    """The mean row, by weights; by nothing where all are zero."""
    total = torch.zeros(rows.shape[1:], dtype=torch.float64)
    own = weights if bool(weights.any()) else torch.ones_like(weights)
    for start, stop in _ranges(len(rows)):
        part = rows.read(start, stop).double()
        total += torch.tensordot(own[start:stop], part, dims=1)
    return (total / own.sum()).to(rows.dtype)


def _ranges(rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _AT_ONCE, rows)) for start in range(0, rows, _AT_ONCE))
