"""DeepLight: the smallest elements are set to zero again and again while training goes on, ever more of them.

Deng, Pan, Zhou, Kong, Flores, Lin, "DeepLight: Deep Lightweight Feature Interactions for Accelerating CTR
Predictions in Ad Serving", WSDM 2021, https://arxiv.org/abs/2002.06987. Every few steps the smallest elements of the
tables become zero, a share that rises fast at first and slowly towards its end. A zero still gets gradients and
may grow back until the next time, so that what is pruned can be put right. Rows and their optimizer go on as they are.

Where we depart from the paper and its code:

- it is the tables that are pruned here, not the network;
- the share of zeros follows from the bytes of a budget, and its way there from the steps of the training: after a part
  `x` of them it lacks `deviation ** x` of its end. Public code lacks `.99 ** (steps / 100)`, which is `1e-3` after
  69,000 steps, and ends far from its target in a shorter training;
- elements are ranked over all tables of a group together, by the first 16 bits of their sizes (steps of less than
  a hundredth), counted over all ranks; what is just too large stays for the last cut, which is exact;
- what is left at the end is trained on as sparse rows, at lower rates, where nothing else can grow.

Rows behind a cache (`fused_uvm_caching`) cannot be written between steps, and are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.backends.base import Backend, MethodState, StageInputs
from embcomp.backends.blocks import column_dtype
from embcomp.backends.element_pruning import ElementPruning
from embcomp.backends.full import FullRoute, RangeCheck
from embcomp.backends.pruned_elements import least_element_bytes
from embcomp.backends.stages import Stage
from embcomp.io.constraints import Between, Count, Le
from embcomp.layers.held_pieces import HeldPieces, TablePieces, between_steps
from embcomp.layers.learned_buffers import Penalised
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.step_count import StepCount
from embcomp.tables.footprint import Footprint, vector_footprint
from embcomp.tables.specs import TableSpec

_STEPS = 5_000  # of a training of which nobody said how long it is
_ROWS_AT_ONCE = 1 << 18
_BITS = 15  # of a size that are looked at: those of a float32 without its sign, but for the last 16


@dataclass(frozen=True, kw_only=True)
class DeepLight(ElementPruning):
    """The largest elements of tables that were pruned while they learned. Ids must lie in `[0, num_embeddings)`.

    Args:
        serve_bytes: the most that the group's serving form may take. A budget sets it.
        every: steps from one pruning to the next.
        deviation: what the share of zeros lacks at the end of the training, as a part of it.
    """

    every: Annotated[int, Count(1), Le(10**6)] = 10
    deviation: Annotated[float, Between(0, 1, "()")] = 1e-3

    name: ClassVar[str] = "deeplight"

    def zero_share(self, tables: Sequence[TableSpec]) -> float:
        """The share of elements that `serve_bytes` leaves no room for."""
        if self.serve_bytes is None:
            return 0.0
        each = max(table.itemsize for table in tables) + column_dtype(tables).itemsize
        room = 1 + (self.serve_bytes - least_element_bytes(tables)) // each
        whole = sum(table.num_embeddings * table.embedding_dim for table in tables)
        return min(1.0, max(0.0, 1 - room / whole))

    @override
    def train_only(self, tables: Sequence[TableSpec]) -> Footprint:
        return Footprint((vector_footprint(f"{tables[0].name}.steps", "mask", 1, itemsize=8),))

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        route = PruningRoute(
            keys,
            RangeCheck(tables),
            [(table.name, table.embedding_dim) for table in tables],
            zero_share=self.zero_share(tables),
            every=self.every,
            deviation=self.deviation,
        )
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=route,
            combine=CountedSteps(route),
            needs_unpooled_rows=True,  # what holds such rows lets routes write to them
        )

    @override
    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(name="prune", purpose="rows, of which ever more elements are zero", keeps="last"),
            Stage(
                name="sparse",
                purpose="train what is left on",
                epochs=1,
                learning_rate=0.1,
                keeps="best_or_start",
            ),
        )

    @override
    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        return self.pruned_form(tables, past.before, past.counts, work=past.work)


class PruningRoute(nn.Module):
    """Ids are rows, of which it sets elements to zero between steps.

    Args:
        keys: names of the look-ups.
        check: refuses ids that are out of range.
        tables: name and width of each.
        zero_share: of all elements, at the end.
        every: steps from one pruning to the next.
        deviation: what the share lacks at the end, as a part of it.
    """

    def __init__(
        self,
        keys: Sequence[str],
        check: RangeCheck,
        tables: Sequence[tuple[str, int]],
        *,
        zero_share: float,
        every: int,
        deviation: float,
    ) -> None:
        super().__init__()
        self.ids = FullRoute(keys, check)
        self.steps = StepCount()
        self._tables = list(tables)
        self._zero_share, self._every, self._deviation = zero_share, every, deviation
        self._pieces = HeldPieces()
        self._share: float | None = None  # to be zero after the step under way; None where it stays

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_share": None}

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        found: KeyedJaggedTensor = self.ids(features)
        return found

    @torch.no_grad()
    def step_begins(self, planned: int | None) -> None:
        """Count a training step, which is under way.

        Args:
            planned: steps of the training; None where nobody said.
        """
        steps = self.steps.next()
        if self._zero_share and steps % self._every == 0:
            self._share = self.share_after(steps, planned or _STEPS)

    def share_after(self, steps: int, planned: int) -> float:
        """The share of elements that are to be zero after so many steps of those planned."""
        return self._zero_share * (1 - self._deviation ** min(1.0, steps / planned))

    @torch.no_grad()
    def write_rows(self, holder: nn.Module) -> None:
        """Set the smallest elements to zero, where it is time to.

        Args:
            holder: the collection that holds the rows, sharded or not; all ranks call it.
        """
        share, self._share = self._share, None
        if share is None:
            return
        pieces = [
            (self._pieces.find(holder, name, "deeplight"), width) for name, width in self._tables
        ]
        device = self.steps.count.device
        with between_steps(device):
            _prune(pieces, share, device)


class CountedSteps(Penalised):
    """Hands rows on as they are, and tells the route of each training step.

    Args:
        route: that is told.
    """

    def __init__(self, route: PruningRoute) -> None:
        super().__init__()
        self._route = (route,)  # which is the route's place, not a child of this

    @override
    def forward(self, rows: Tensor) -> Tensor:
        self._tell()
        return rows

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        self._tell()
        return list(parts)

    def _tell(self) -> None:
        if self.training and torch.is_grad_enabled():
            self._route[0].step_begins(self.planned_steps)


def _prune(tables: Sequence[tuple[TablePieces, int]], share: float, device: torch.device) -> None:
    """Set a share of the elements of tables to zero, those of the smallest sizes, and none too many.

    Args:
        tables: where each lies, and its width without padding.
        share: of all elements together.
        device: where they are.
    """
    whole = sum(table.size[0] * width for table, width in tables)
    fewer = _histogram(tables, device).cumsum(0) <= int(share * whole)  # bins that go whole
    bound = fewer.sum()
    for table, width in tables:
        for part in _true_columns(table, width):
            part.mul_(_keys(part) >= bound)


def _histogram(tables: Sequence[tuple[TablePieces, int]], device: torch.device) -> Tensor:
    """(2**15,) how many elements of all tables, on all ranks, have each key."""
    alone, shared = (torch.zeros(1 << _BITS, dtype=torch.int64, device=device) for _ in range(2))
    group = None
    for table, width in tables:
        into = alone if table.group is None else shared
        group = table.group or group
        for part in _true_columns(table, width):
            keys = _keys(part).flatten()
            into.index_add_(0, keys, torch.ones_like(keys, dtype=torch.int64))
    if group is not None:
        dist.all_reduce(shared, group=group)
    return alone + shared


def _true_columns(table: TablePieces, width: int) -> Iterator[Tensor]:
    """A table on this rank, a part of its rows at a time, without the columns that only pad."""
    for piece, (_, column) in table.pieces:
        if column < width:
            yield from piece[:, : width - column].split(_ROWS_AT_ONCE)


def _keys(values: Tensor) -> Tensor:
    """int32 in [0, 2**15) that are ordered as sizes are."""
    return values.abs().float().view(torch.int32) >> 16
