"""Prefixes of embeddings: how wide each is drawn to be, and the columns that this leaves.

Training with widths drawn anew for every sample and field orders an embedding's columns by use: any
prefix works afterwards, with no further training. OptEmbed searches over such widths, Matryoshka
tables are cut to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from embcomp.layers.constant_tensors import Constant
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.learned_buffers import LearnedBuffers
from embcomp.layers.lookup_context import LookupContext
from embcomp.tables.footprint import TensorFootprint, vector_footprint
from embcomp.tables.name_hash import name64

_FINENESS = 1 << 30  # of probabilities
_SANDWICH = "\0sandwich"  # no table is called so


class GroupColumns:
    """The columns of a group's embeddings, side by side.

    Args:
        dims: width of each (table, feature)'s embedding.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        self.dims = list(dims)
        self.widest = max(dims)
        self._uniform = len(set(dims)) == 1
        self._owner = Constant([pair for pair, dim in enumerate(dims) for _ in range(dim)])
        self._place = Constant([column for dim in dims for column in range(dim)])

    def spread(self, values: Tensor) -> Tensor:
        """(R, pairs) -> (R, sum of dims): each value over its embedding's columns."""
        if self._uniform:
            wide = values.unsqueeze(2).expand(-1, -1, self.dims[0])
            return wide.reshape(len(values), -1)
        return values.index_select(1, self._owner.on(values.device))

    def sums(self, rows: Tensor) -> Tensor:
        """(R, sum of dims) -> (R, pairs): the sum over each embedding's columns."""
        if self._uniform:
            return rows.view(len(rows), len(self.dims), -1).sum(2)
        owner = self._owner.on(rows.device)
        return rows.new_zeros(len(rows), len(self.dims)).index_add(1, owner, rows)

    def prefixes(self, widths: Tensor) -> Tensor:
        """(R or 1, pairs) widths -> (R or 1, sum of dims) bool, true in the first columns."""
        return self._place.on(widths.device) < self.spread(widths)


class WidthDraws(LearnedBuffers):
    """Draws a width for each sample and (table, feature), other ones in each step.

    Draws are hashes of the step, the sample's number in the whole step, and the names of table and
    feature, so they do not depend on the number of ranks or the order of tables, and a resumed
    training draws what it would have drawn.

    Args:
        pairs: names of the table and the feature of each (table, feature).
        choices: for each (table, feature), the widths to draw from.
        weights: for each, the probability of each width up to a factor; equal when None.
        seed: of the draws.
        full: share of the samples whose embeddings are all left whole.
        least: share of the samples whose embeddings are all cut to their least width.
    """

    step: Tensor

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        choices: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]] | None,
        seed: int,
        *,
        full: float = 0.0,
        least: float = 0.0,
    ) -> None:
        super().__init__()
        self._whole, self._cut = round(full * _FINENESS), round((full + least) * _FINENESS)
        self._sandwich = Constant([table_salt(seed, _SANDWICH, 0)])
        most = max(len(widths) for widths in choices)
        shape = (len(choices), most)
        self._choices = Constant(
            [w for ws in choices for w in (*ws, *[ws[-1]] * (most - len(ws)))], shape
        )
        self._salts = Constant([table_salt(seed, t, name64(feature)) for t, feature in pairs])
        self._counts = Constant([len(widths) for widths in choices])
        self._bounds = None
        if weights is not None:
            bounds = [_bounds(parts, most) for parts in weights]
            self._bounds = Constant([bound for part in bounds for bound in part], shape)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @override
    def reset_buffers(self) -> None:
        self.step.zero_()

    def forward(self, looked_up: LookupContext) -> Tensor:
        """The widths of one training step: (rows, pairs) int64; bags of a sample have one width."""
        self.ensure_filled()
        samples = looked_up.global_samples()
        pairs = torch.arange(samples.shape[1], device=samples.device)
        widths = self._drawn(samples, pairs)
        self._count_step()
        return widths

    def each(self, looked_up: LookupContext) -> list[Tensor]:
        """The same, pair by pair: (N of the pair's values,) int64."""
        self.ensure_filled()
        samples = looked_up.each_global_sample()
        pairs = torch.arange(len(samples), device=samples[0].device).split(1)
        widths = [self._drawn(own, pair) for own, pair in zip(samples, pairs)]
        self._count_step()
        return widths

    def _drawn(self, samples: Tensor, pairs: Tensor) -> Tensor:
        """Widths for samples of pairs, whose shape broadcasts over the last axis."""
        device = samples.device
        key = self.step * (1 << 31) + samples
        salts = self._salts.on(device)[pairs]
        if self._bounds is None:
            index = hash_rows(key, salts, self._counts.on(device)[pairs])
        else:
            drawn = hash_rows(key, salts, torch.full_like(salts, _FINENESS))
            index = (drawn.unsqueeze(-1) >= self._bounds.on(device)[pairs]).sum(-1)
        choices = self._choices.on(device)[pairs]  # (pairs, widths), or (widths,) of one
        drawn = self._choices.on(device)[pairs, index]
        return self._sandwiched(drawn, choices, key)

    def _sandwiched(self, drawn: Tensor, choices: Tensor, key: Tensor) -> Tensor:
        """Drawn widths, but for the samples that are whole or least in all their embeddings."""
        if not self._cut:
            return drawn
        salts = self._sandwich.on(key.device)
        role = hash_rows(key, salts, torch.full_like(salts, _FINENESS))
        least = torch.where(role < self._cut, choices[..., 0], drawn)
        return torch.where(role < self._whole, choices[..., -1], least)

    @torch.no_grad()
    def _count_step(self) -> None:
        self.step += 1


def _bounds(weights: Sequence[float], length: int) -> list[int]:
    """Where each choice's share of [0, 1) ends, the last one's beyond every draw."""
    total, ends, sum_so_far = sum(weights), [], 0.0
    for weight in weights:
        sum_so_far += weight
        ends.append(round(sum_so_far / total * _FINENESS))
    ends[-1] = _FINENESS
    return ends + [_FINENESS] * (length - len(ends))


def draws_footprint(name: str) -> TensorFootprint:
    """The step counter of `WidthDraws`, which serving does not need."""
    return vector_footprint(name, "mask", 1, itemsize=8)
