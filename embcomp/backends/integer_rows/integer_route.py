"""Looks stored integers up as weights, watches what these are pulled to, and writes it into the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self, override

from embcomp.backends.full import RangeCheck
from embcomp.backends.integer_rows.integer_cells import cells_of, weights_of
from embcomp.backends.integer_rows.integer_updates import UpdateRule, rounding_draws
from embcomp.errors import ConfigError
from embcomp.layers.gathered_gradients import KeyGradients, over_ranks
from embcomp.layers.hashing import table_salt
from embcomp.layers.held_pieces import between_steps
from embcomp.layers.learned_buffers import LearnedBuffers
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.routing import renamed
from embcomp.layers.row_optimizers import HeldOptimizers, OptimizedRows, have_optimizers


@dataclass(frozen=True, kw_only=True)
class IntegerTable:
    """A table of stored integers.

    Args:
        name: the table, logical and physical.
        dim: weights of a row.
        num_features: features that are looked up in it.
    """

    name: str
    dim: int
    num_features: int


@dataclass
class Pulls:
    """The ids of a forward pass, key by key, and the gradients of their weights that rows have not taken in.

    Attributes:
        ids: (N,) int64 each.
        gradients: (N, D) each, the sum over backward passes; None where there is none.
    """

    ids: list[Tensor]
    gradients: list[Tensor | None]

    @classmethod
    def of(cls, ids: list[Tensor]) -> Self:
        """Of a pass without gradients yet."""
        return cls(ids=ids, gradients=[None] * len(ids))

    def take(self) -> Self:
        """What is there, which then is here no more."""
        taken = type(self)(ids=self.ids, gradients=self.gradients)
        self.gradients = [None] * len(self.ids)
        return taken


class IntegerRoute(LearnedBuffers):
    """Ids are rows, and rows are updated here: no gradient reaches them.

    Attributes:
        updates: (tables,) int64, how many updates each table has had.
        pulls: of forward passes that a gradient came back to since the last call of `write_rows`.

    Args:
        method: its name, for errors.
        keys: names of the look-ups, feature after feature.
        check: refuses ids that are no rows.
        tables: in the order of the look-ups.
        rule: how rows take updates in.
        seed: salts the draws.
    """

    updates: Tensor

    def __init__(
        self,
        method: str,
        keys: Sequence[str],
        check: RangeCheck,
        tables: Sequence[IntegerTable],
        *,
        rule: UpdateRule,
        seed: int,
    ) -> None:
        super().__init__()
        self.check = check
        self.pulls: list[Pulls] = []
        self._method, self._keys, self._tables, self._rule = method, list(keys), list(tables), rule
        self._salts = [table_salt(seed, table.name) for table in tables]
        self._widths = [table.dim for table in tables for _ in range(table.num_features)]
        self._rates: dict[str, float] = {}
        self._held = HeldOptimizers()
        self.store_in_parts("updates", [(table.name, 1) for table in tables])
        self.register_buffer("updates", torch.zeros(len(tables), dtype=torch.int64))

    def __getstate__(self) -> dict[str, Any]:
        # What was watched hangs on a step that is under way.
        return {**self.__dict__, "pulls": [], "_rates": {}}

    @override
    def reset_buffers(self) -> None:
        self.updates.zero_()

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        self.ensure_filled()
        return renamed(self.check(features), self._keys)

    def pull(self, pulls: Pulls, key: int, gradient: Tensor) -> None:
        """Add what a backward pass made of a key's weights: (N, D)."""
        if all(each is None for each in pulls.gradients):
            self.pulls.append(pulls)
        before = pulls.gradients[key]
        gradient = gradient.detach().float()
        pulls.gradients[key] = gradient if before is None else before + gradient

    @torch.no_grad()
    def write_rows(self, holder: nn.Module) -> None:
        """Update the rows that the last step's gradients pull at.

        Args:
            holder: the collection that holds the rows, sharded or not; all ranks call it.
        """
        pulls, self.pulls = [each.take() for each in self.pulls], []
        names = [table.name for table in self._tables]
        if not pulls and not have_optimizers(holder, names):
            return  # nothing learns here
        held = self._held.find(holder, names, self._method)
        with between_steps(self.updates.device):
            self._update(holder, held, pulls)
        # A schedule sets the rate of a step before its rows are looked up.
        self._rates = {name: own[0].rate() for name, own in held.items() if own}

    def _update(
        self, holder: nn.Module, held: Mapping[str, Sequence[OptimizedRows]], pulls: Sequence[Pulls]
    ) -> None:
        own = [_of_key(pulls, key, width) for key, width in enumerate(self._widths)]
        if isinstance(holder, ShardedEmbeddingBagCollection) and dist.get_world_size() > 1:
            device = self.updates.device
            ranks = dist.get_world_size() if get_gradient_division() else 1
            gathered = over_ranks(own, self._widths, device)
            own = [
                KeyGradients(ids=each.ids, gradients=each.gradients / ranks) for each in gathered
            ]
        first = 0
        for place, table in enumerate(self._tables):
            parts = own[first : first + table.num_features]
            first += table.num_features
            ids = torch.cat([part.ids for part in parts])
            if not len(ids):
                continue
            self.ensure_filled()
            self.updates[place] += 1
            gradients = torch.cat([part.gradients for part in parts])
            for rows in held[table.name]:
                self._update_rows(rows, place, ids, gradients)

    def _update_rows(self, held: OptimizedRows, place: int, ids: Tensor, gradients: Tensor) -> None:
        """Update a table's rows that lie together.

        Args:
            held: the rows.
            place: of the table among ours.
            ids: (N,) int64 rows of the table, in any order, repeated or elsewhere.
            gradients: (N, D) float32.
        """
        here = (ids >= held.first_row) & (ids < held.first_row + len(held.weight))
        ids, places = ids[here].unique(return_inverse=True)
        if not len(ids):
            return
        table = self._tables[place]
        summed = gradients.new_zeros(len(ids), table.dim).index_add_(0, places, gradients[here])
        summed = held.cut(summed)
        rows = ids - held.first_row
        rate = self._rates.get(table.name)
        rates = held.rates_of(rows, summed, held.rate() if rate is None else rate)
        draws = rounding_draws(ids, table.dim, self._salts[place], self.updates[place])
        columns = cells_of(table.dim, self._rule.bits) + 1
        stored = held.weight[rows, :columns]
        held.weight[rows, :columns] = self._rule.updated(stored, summed, rates, draws)


class IntegerWeights(nn.Module):
    """Makes weights of stored rows, and tells the route what they were pulled to.

    Args:
        tables: in the order of the look-ups.
        bits: 8 or 16.
        route: that is told; None where nothing is trained.
    """

    def __init__(
        self, tables: Sequence[IntegerTable], bits: int, route: IntegerRoute | None
    ) -> None:
        super().__init__()
        self._route = (route,)  # which is the route's place, not a child of this
        self._bits = bits
        self._dims = [table.dim for table in tables for _ in range(table.num_features)]
        self._columns = [cells_of(dim, bits) + 1 for dim in self._dims]

    @override
    def forward(self, rows: Tensor, looked_up: LookupContext | None = None) -> Tensor:
        weights = self._weights(rows)
        route = None if looked_up is None else self._watcher([rows])
        if looked_up is None or route is None:
            return weights
        pulls = Pulls.of([own.detach() for own in looked_up.each_ids()])

        def tell(gradient: Tensor) -> None:
            for key, part in enumerate(gradient.split(self._dims, dim=1)):
                route.pull(pulls, key, part[: len(pulls.ids[key])])

        weights.requires_grad_().register_hook(tell)
        return weights

    def _weights(self, rows: Tensor) -> Tensor:
        """(R, sum of columns) -> (R, sum of dims)."""
        if len(set(self._dims)) == 1:
            apart = rows.unflatten(1, (len(self._dims), self._columns[0]))
            return weights_of(apart, self._dims[0], self._bits).flatten(1)
        parts = zip(rows.split(self._columns, dim=1), self._dims)
        return torch.cat([weights_of(part, dim, self._bits) for part, dim in parts], dim=1)

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        made = [weights_of(part, dim, self._bits) for part, dim in zip(parts, self._dims)]
        route = self._watcher(parts)
        if route is None:
            return made
        pulls = Pulls.of([own.detach() for own in looked_up.each_ids()])
        for key, weights in enumerate(made):
            weights.requires_grad_().register_hook(partial(route.pull, pulls, key))
        return made

    def _watcher(self, parts: Sequence[Tensor]) -> IntegerRoute | None:
        """The route, if rows learn from this pass: in evaluation mode, too, as rows of weights do."""
        (route,) = self._route
        if route is None or not torch.is_grad_enabled():
            return None
        if not any(part.requires_grad for part in parts):
            return None
        if not torch.compiler.is_compiling():
            return route
        if self.training:
            raise ConfigError(
                "int8, int16, alpt: a compiled training step cannot hand gradients to stored integers; train "
                "without torch.compile, or compile what comes after the collection"
            )
        return None


def _of_key(pulls: Sequence[Pulls], key: int, width: int) -> KeyGradients:
    """The ids of a key and their gradients, over several passes."""
    found = [(each.ids[key], each.gradients[key]) for each in pulls]
    pairs = [(ids, gradients) for ids, gradients in found if gradients is not None]
    if not pairs:
        return KeyGradients(ids=torch.empty(0, dtype=torch.int64), gradients=torch.empty(0, width))
    return KeyGradients(
        ids=torch.cat([ids for ids, _ in pairs]), gradients=torch.cat([each for _, each in pairs])
    )
