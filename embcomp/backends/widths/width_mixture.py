"""Embeddings as mixtures of their prefixes, in which tables learn what each width weighs.

A column counts as much as all the widths that have it weigh together. Noise is drawn by hashes of the step and the
names of tables, so that ranks together draw what one process would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from embcomp.layers.constant_tensors import Constant
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.learned_buffers import LearnedBuffers, Penalised
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.named_parts import NamedParts

_FINENESS = 1 << 30  # of probabilities
_STEPS = 5_000  # of a training of which nobody said how long it is
_COOLEST = 0.1  # of the first temperature


@dataclass(frozen=True, kw_only=True)
class MixedTable:
    """The widths of a table.

    Attributes:
        name: the table.
        dim: columns of its rows.
        widths: rising, the last one `dim`.
        num_features: features that are looked up in it.
    """

    name: str
    dim: int
    widths: tuple[int, ...]
    num_features: int


def column_shares(weights: Tensor, widths: Sequence[int], dim: int) -> Tensor:
    """(dim,) what each column of a table counts without noise.

    Args:
        weights: (widths,) before the softmax.
        widths: rising, the last one `dim`.
        dim: columns.
    """
    tails = _tails(weights.unsqueeze(0))[0]
    return tails[torch.tensor(_first_beyond(widths, dim))]


def _first_beyond(widths: Sequence[int], dim: int) -> list[int]:
    """For each column, the place of the first width that has it."""
    return [sum(width <= column for width in widths) for column in range(dim)]


def _tails(weights: Tensor) -> Tensor:
    """(tables, widths) what each width and all wider ones weigh together, as float32.

    In float64, so that the last bit does not follow from how many tables there are, and the whole is 1.
    """
    shares = weights.double().softmax(1)
    return shares.flip(1).cumsum(1).flip(1).float()


class WidthWeights(NamedParts):
    """What widths weigh, before the softmax; all alike at first.

    Args:
        tables: names, and how many widths each has.
    """

    def __init__(self, tables: Sequence[tuple[str, int]]) -> None:
        super().__init__()
        self.store_in_parts("values", tables)
        self.values = nn.Parameter(torch.empty(sum(count for _, count in tables)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to where they begin."""
        nn.init.zeros_(self.values)


class MixtureNoise(LearnedBuffers):
    """Gumbel noise for each width of each table, other one in each step.

    Attributes:
        step: () int64 how often it was drawn.

    Args:
        salts: for each table, one for each width.
    """

    step: Tensor

    def __init__(self, salts: Sequence[Sequence[int]]) -> None:
        super().__init__()
        most = max(len(own) for own in salts)
        padded = [salt for own in salts for salt in (*own, *[0] * (most - len(own)))]
        self._salts = Constant(padded, (len(salts), most))
        self._rows = Constant([_FINENESS])
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @override
    def reset_buffers(self) -> None:
        self.step.zero_()

    @torch.no_grad()
    def next(self) -> Tensor:
        """(tables, widths) float64 the noise of a step."""
        self.ensure_filled()
        salts = self._salts.on(self.step.device)
        drawn = hash_rows(self.step.expand_as(salts), salts, self._rows.on(self.step.device))
        self.step += 1
        uniform = (drawn.double() + 0.5) / _FINENESS
        return -(-uniform.log()).log()


class WidthMixture(Penalised):
    """Multiplies columns by what the widths that have them weigh; linear, so that bags are pooled before.

    Args:
        tables: in the order of the look-ups.
        temperature: of the softmax at the beginning of a training; it falls to a tenth of it.
        seed: of the noise.
    """

    def __init__(self, tables: Sequence[MixedTable], *, temperature: float, seed: int) -> None:
        super().__init__()
        self.weights = WidthWeights([(table.name, len(table.widths)) for table in tables])
        self.draws = MixtureNoise(
            [[table_salt(seed, t.name, n) for n in range(len(t.widths))] for t in tables]
        )
        self._temperature = temperature
        most = max(len(table.widths) for table in tables)
        self._shape = (len(tables), most)
        first, places = 0, []
        for table in tables:
            own = range(first, first + len(table.widths))
            places += [*own, *[-1] * (most - len(own))]
            first += len(own)
        self._places = Constant(places, self._shape)
        columns = [
            most * n + place
            for n, table in enumerate(tables)
            for _ in range(table.num_features)
            for place in _first_beyond(table.widths, table.dim)
        ]
        self._columns = Constant(columns)
        self._dims = [table.dim for table in tables for _ in range(table.num_features)]

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (B, sum of dims) -> (B, sum of dims)
        return rows * self._shares(rows.device)

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        shares = self._shares(self.weights.values.device).split(self._dims)
        return [part * own for part, own in zip(parts, shares)]

    def _shares(self, device: torch.device) -> Tensor:
        """(sum of dims,) what each column counts."""
        places = self._places.on(device)
        weights = self.weights.values.double()[places.clamp(min=0)]
        weights = weights.masked_fill(places < 0, -torch.inf)
        if self.training and torch.is_grad_enabled():
            done = self.draws.step / (self.planned_steps or _STEPS)
            falls = 1 - (1 - _COOLEST) * done.clamp(max=1)
            weights = (weights + self.draws.next()) / (self._temperature * falls)
        return _tails(weights).flatten()[self._columns.on(device)]
