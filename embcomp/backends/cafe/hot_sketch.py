"""A sketch of which ids matter most, in buckets of a few ids each.

The cells of a bucket are those of SpaceSaving (Metwally, Agrawal, El Abbadi, ICDT 2005): an id that has one adds to
its score, and one that has none takes the cell of the least score and goes on from that. The first cells of
a bucket are its hot ones, which own a row each; the others wait. All of a batch is done at once, by tensor
operations whose shapes do not depend on values, so that no device is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from embcomp.layers.constant_tensors import Constant
from embcomp.layers.host_values import on_device
from embcomp.layers.learned_buffers import LearnedBuffers

WAYS = 4
"""Hot cells of a bucket."""
WAITING = 12
"""Cells of a bucket that wait: three for each hot one, as four cells a row are the paper's choice."""
LARGEST_ID = 2**31 - 1
"""Ids from here on are never hot: a hot id is stored in 32 bits."""
_MOST_GROWTH = 20.0  # natural logarithm, between two divisions; a float32 has room for 88


@dataclass(frozen=True, kw_only=True)
class Risen:
    """What became hot in the buckets that ids of a batch belong to.

    Ids of one bucket are told the same.

    Attributes:
        rises: (N,) bool whether an id has become hot in this id's bucket.
        cells: (N,) int64 the hot cell that it took.
        ids: (N,) int64 which id it is.
    """

    rises: Tensor
    cells: Tensor
    ids: Tensor


class HotSketch(LearnedBuffers):
    """Scores of ids, and which of them are hot.

    Attributes:
        hot: (hot cells,) int32 the id of each, -1 for none.
        hot_scores: (hot cells,) their scores.
        waiting: (waiting cells,) int32 the id of each, -1 for none.
        waiting_scores: (waiting cells,) their scores.
        growth: (tables with hot cells,) float64 what a new score is multiplied by: it grows where others would decay.

    Args:
        tables: names, and how many hot cells each has, a multiple of `WAYS`.
        adapts: whether there are scores; without, what is hot stays.
        threshold: score from which an id may become hot.
        margin: how many times the score of the least hot id of its bucket it must have.
        decay: what scores are multiplied by in a period.
        periods: for each table with hot cells, look-ups.
    """

    hot: Tensor
    hot_scores: Tensor
    waiting: Tensor
    waiting_scores: Tensor
    growth: Tensor

    def __init__(
        self,
        tables: Sequence[tuple[str, int]],
        *,
        adapts: bool,
        threshold: float,
        margin: float,
        decay: float,
        periods: Sequence[int],
    ) -> None:
        super().__init__()
        self._log_growth, self._periods = -math.log(decay), Constant(periods)
        self._lengths = list(periods)
        self._grown = 0.0
        self._adapts, self._threshold, self._margin = adapts, threshold, margin
        cells = sum(count for _, count in tables)
        per_row = WAITING // WAYS
        self.store_in_parts("hot", tables)
        self.register_buffer("hot", torch.full((cells,), -1, dtype=torch.int32))
        self._sizes = [count for _, count in tables if count]
        if not adapts:
            return
        waiting = [(name, per_row * count) for name, count in tables]
        kinds = (("hot_scores", tables), ("waiting", waiting), ("waiting_scores", waiting))
        for tensor, parts in kinds:
            self.store_in_parts(tensor, parts)
        self.store_in_parts("growth", [(name, int(count > 0)) for name, count in tables])
        self.register_buffer("hot_scores", torch.zeros(cells))
        self.register_buffer("waiting", torch.full((per_row * cells,), -1, dtype=torch.int32))
        self.register_buffer("waiting_scores", torch.zeros(per_row * cells))
        self.register_buffer("growth", torch.ones(len(self._sizes), dtype=torch.float64))

    @property
    def adapts(self) -> bool:
        """Whether there are scores."""
        return self._adapts

    @override
    def reset_buffers(self) -> None:
        self.hot.fill_(-1)
        if self._adapts:
            self.waiting.fill_(-1)
            self.hot_scores.zero_()
            self.waiting_scores.zero_()
            self.growth.fill_(1)

    def cell(self, ids: Tensor, buckets: Tensor) -> tuple[Tensor, Tensor]:
        """Which hot cell an id has.

        Args:
            ids: int64 of any shape.
            buckets: of the same.

        Returns:
            Whether it has one, and which: of the same shape.
        """
        cells = buckets.unsqueeze(-1) * WAYS + torch.arange(WAYS, device=ids.device)
        found = (self.hot[cells] == ids.unsqueeze(-1)) & (ids >= 0).unsqueeze(-1)
        place = (found * cells).sum(-1)  # no id is in two cells
        return found.any(-1), place

    @torch.no_grad()
    def add(
        self, ids: Tensor, keys: Tensor, buckets: Tensor, tables: Tensor, scores: Tensor
    ) -> Risen:
        """Add the scores of a batch's ids.

        Args:
            ids: (N,) int64; those outside of `[0, LARGEST_ID)` are left out.
            keys: (N,) int64, equal for equal ids of equal tables.
            buckets: (N,) int64, equal for equal keys.
            tables: (N,) int64 the table of each, counted among those with hot cells.
            scores: (N,) not negative.
        """
        growth = self.growth[tables].to(scores.dtype)
        scores = scores * growth
        total, is_first = _totals(keys, scores)
        may = (ids >= 0) & (ids < LARGEST_ID)
        hot = _cells_of(buckets, WAYS, ids.device)
        waiting = _cells_of(buckets, WAITING, ids.device)
        wanted = torch.where(may, ids, -2).unsqueeze(1)
        hits = self.hot[hot] == wanted, self.waiting[waiting] == wanted
        for scored, cells, hit in zip((self.hot_scores, self.waiting_scores), (hot, waiting), hits):
            added = torch.where(hit & is_first.unsqueeze(1), total.unsqueeze(1), 0.0)
            scored.index_add_(0, cells.flatten(), added.flatten())
        missed = may & ~hits[0].any(1) & ~hits[1].any(1) & (total > 0)
        new = self._take_in(ids, buckets, torch.where(missed, total, 0.0), waiting)
        older = torch.where(new == waiting, -1.0, self.waiting_scores[waiting])
        return self._raise(hot, waiting, older, self._threshold * growth)

    def _take_in(self, ids: Tensor, buckets: Tensor, scores: Tensor, waiting: Tensor) -> Tensor:
        """Give the best new id of each bucket the least waiting cell.

        Args:
            ids: (N,).
            buckets: (N,).
            scores: (N,) 0 for those that are not new.
            waiting: (N, WAITING) the cells of their buckets.

        Returns:
            (N, 1) the cell that was taken in the bucket; -1 where none was.
        """
        count = self.hot.shape[0] // WAYS
        best = scores.new_zeros(count).scatter_reduce(0, buckets, scores, "amax")[buckets]
        place = torch.arange(ids.shape[0], device=ids.device)
        wins = (scores == best) & (scores > 0)
        first = place.new_full((count,), -1).scatter_reduce(
            0, buckets, torch.where(wins, place, -1), "amax"
        )[buckets]
        comes = first >= 0
        least, which = self.waiting_scores[waiting].min(1)
        cell = waiting.gather(1, which.unsqueeze(1)).squeeze(1)
        # Every id of a bucket writes the same.
        newcomer = ids[first.clamp(min=0)].to(torch.int32)
        self.waiting[cell] = torch.where(comes, newcomer, self.waiting[cell])
        self.waiting_scores[cell] = torch.where(comes, least + best, self.waiting_scores[cell])
        return torch.where(comes, cell, -1).unsqueeze(1)

    def _raise(self, hot: Tensor, waiting: Tensor, scores: Tensor, threshold: Tensor) -> Risen:
        """Let the best waiting id of each bucket change places with its least hot one, if it is so much better.

        Args:
            hot: (N, WAYS) the hot cells of buckets.
            waiting: (N, WAITING) the waiting cells.
            scores: (N, WAITING) of the ids that may rise.
            threshold: (N,) the least score that does.
        """
        top, which = scores.max(1)
        source = waiting.gather(1, which.unsqueeze(1)).squeeze(1)
        low, which = self.hot_scores[hot].min(1)
        target = hot.gather(1, which.unsqueeze(1)).squeeze(1)
        rises = top >= (self._margin * low).maximum(threshold)
        up, down = self.waiting[source], self.hot[target]
        self.hot[target] = torch.where(rises, up, down)
        self.waiting[source] = torch.where(rises, down, up)
        kept = self.waiting_scores[source]
        self.hot_scores[target] = torch.where(rises, top, low)
        self.waiting_scores[source] = torch.where(rises, low, kept)
        return Risen(rises=rises, cells=target, ids=up.to(torch.int64))

    @torch.no_grad()
    def age(self, lookups: Sequence[int]) -> None:
        """Let scores that are there weigh less against those to come.

        What is to come is multiplied by more, instead of all that is there by less. Once in a while both are
        divided by one power of two, which changes no comparison whenever it is done.

        Args:
            lookups: in each table with hot cells, since the last call.
        """
        count = on_device(lookups, self.growth.device).to(torch.float64)
        logs = count / self._periods.on(self.growth.device) * self._log_growth
        self.growth.mul_(logs.clamp_(max=_MOST_GROWTH).exp_())
        known = (n / period for n, period in zip(lookups, self._lengths))
        self._grown += min(_MOST_GROWTH, max(known, default=0.0) * self._log_growth)
        if self._grown >= _MOST_GROWTH:
            self._rescale()
            self._grown = 0.0

    def _rescale(self) -> None:
        exponents = self.growth.log2().floor()
        self.growth.copy_(torch.ldexp(self.growth, -exponents))
        for scores, per_row in ((self.hot_scores, 1), (self.waiting_scores, WAITING // WAYS)):
            sizes = on_device([count * per_row for count in self._sizes], scores.device)
            each = exponents.repeat_interleave(sizes, output_size=scores.shape[0])
            scores.copy_(torch.ldexp(scores, -each.to(scores.dtype)))


def _cells_of(buckets: Tensor, width: int, device: torch.device) -> Tensor:
    return buckets.unsqueeze(1) * width + torch.arange(width, device=device)


def _totals(keys: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """For each value, the sum of the scores of its equals, and whether it is the first of them.

    Args:
        keys: (N,) int64.
        scores: (N,).
    """
    order = keys.argsort(stable=True)
    ordered = keys[order]
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    group = begins.cumsum(0) - 1
    sums = torch.zeros_like(scores).index_add_(0, group, scores[order])
    total, is_first = torch.empty_like(scores), torch.empty_like(begins)
    total[order], is_first[order] = sums[group], begins
    return total, is_first
