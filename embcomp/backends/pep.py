"""PEP: elements shrunk by learnt thresholds, those that are left trained again.

Liu, Gao, Chen, Jin, Li, "Learnable Embedding Sizes for Recommender Systems", ICLR 2021,
https://arxiv.org/abs/2101.07577. In training an element `v` is looked up as `sign(v) max(|v| - sigmoid(s), 0)`, with
thresholds `s` that learn with the rest. What is above its threshold at the end is trained again, from its
initial weight, as sparse rows.

Where we depart from the paper and its code:

- thresholds are those of tables or of their columns. Those of single ids and elements, which the paper has too, would be
  as large as the tables, and would rise with looked-up rows only, too slowly to prune what is rare;
- thresholds rise by `climb` in a training, whatever its steps, but where the task's gradient holds them. In public
  code nothing but weight decay moves a threshold that starts at -150, through the normalisation of dense Adam, by a
  learning rate a step, so that how much is pruned follows from the number of steps. With fused optimizers, which
  touch looked-up rows only and decay nothing else, pruning would never begin;
- a budget of bytes decides how many elements are kept, by size over all tables after the thresholds, where the paper
  stores a table each time that a number of elements is passed;
- only looked-up rows are thresholded in a step (public code computes all of a table), and ids that training never
  saw keep nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from embcomp.backends.base import Backend, MethodState, StageInputs
from embcomp.backends.element_pruning import ElementPruning
from embcomp.backends.full import FullRoute, RangeCheck
from embcomp.backends.stages import Stage
from embcomp.io.constraints import Between, Ge, Le, Positive
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.learned_buffers import Penalised
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.named_parts import NamedParts
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.footprint import Footprint, vector_footprint
from embcomp.tables.specs import TableSpec, by_name

Granularity = Literal["table", "column"]

_STEPS = 5_000  # of a training of which nobody said how long it is


@dataclass(frozen=True, kw_only=True)
class PEP(ElementPruning):
    """Elements above learnt thresholds. Ids must lie in `[0, num_embeddings)`.

    Args:
        serve_bytes: the most that the group's serving form may take. A budget sets it.
        granularity: what has a threshold of its own.
        threshold_init: where thresholds begin, before the sigmoid.
        climb: by how much they rise in a training in which the task does not hold them.
        threshold_learning_rate: of the plain SGD that thresholds have to themselves; what the task's gradient
            weighs against the climb.
        inherit: whether the retraining goes on from trained weights rather than initial ones.
    """

    granularity: Granularity = "column"
    threshold_init: Annotated[float, Between(-100, 100)] = -8.0
    climb: Annotated[float, Ge(0), Le(10**6)] = 6.0
    threshold_learning_rate: Annotated[float, Positive(), Le(10**6)] = 1.0
    inherit: bool = False

    name: ClassVar[str] = "pep"

    def _thresholds_of(self, table: TableSpec) -> int:
        return table.embedding_dim if self.granularity == "column" else 1

    @override
    def train_only(self, tables: Sequence[TableSpec]) -> Footprint:
        return Footprint(
            tuple(
                vector_footprint(f"{table.name}.thresholds", "mask", self._thresholds_of(table))
                for table in tables
            )
        )

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        thresholds = ElementThresholds(
            [(table.name, self._thresholds_of(table)) for table in tables], self.threshold_init
        )
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=FullRoute(keys, RangeCheck(tables)),
            combine=SoftThreshold(
                tables, thresholds, pull=self.climb / self.threshold_learning_rate
            ),
            needs_unpooled_rows=True,
        )

    @override
    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(name="prune", purpose="rows and the thresholds that shrink them", keeps="last"),
            Stage(
                name="retrain",
                purpose="what is left within the budget",
                reinit_network=not self.inherit,
            ),
        )

    @override
    def structure_optimizer(
        self, stage: Stage, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Optimizer | None:
        if stage.name != "prune":
            return None
        return torch.optim.SGD(parameters, lr=self.threshold_learning_rate)

    @override
    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        initial = None if self.inherit else past.initial()
        return self.pruned_form(tables, past.before, past.counts, initial=initial, work=past.work)

    @override
    def trained_rows(
        self, tables: Sequence[TableSpec], form: MethodState
    ) -> Mapping[str, RowSource]:
        tables = by_name(tables)
        values = form.tensors["combine.thresholds.values"].detach().cpu()
        own = values.split([self._thresholds_of(table) for table in tables])
        return {
            table.name: _shrunk(form.rows(table.name), each.sigmoid())
            for table, each in zip(tables, own)
        }


def _shrunk(rows: RowSource, limits: Tensor) -> RowSource:
    """Rows after `soft_threshold`."""
    own = limits.to(rows.dtype)
    return ComputedRows(
        rows.shape, rows.dtype, lambda a, b: soft_threshold(rows.read(a, b), own), of=[rows]
    )


def soft_threshold(rows: Tensor, limits: Tensor) -> Tensor:
    """(N, D) elements, whose sizes are reduced by limits (D,) or (1,) and no further than to zero."""
    return rows.sign() * (rows.abs() - limits).clamp(min=0)


class ElementThresholds(NamedParts):
    """Thresholds before the sigmoid, of tables or of their columns.

    Attributes:
        counts: how many thresholds each table has.

    Args:
        tables: names, and how many thresholds each has.
        initial: where all begin.
    """

    def __init__(self, tables: Sequence[tuple[str, int]], initial: float) -> None:
        super().__init__()
        self._initial = initial
        self.counts = [count for _, count in tables]
        self.store_in_parts("values", tables)
        self.values = nn.Parameter(torch.empty(sum(count for _, count in tables)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to where they begin."""
        nn.init.constant_(self.values, self._initial)

    @override
    def forward(self) -> Tensor:
        """(thresholds,) what sizes are reduced by.

        A CPU takes several at a time, and the last bit of a sigmoid follows from the place in them: table by
        table it does not follow from what other tables there are.
        """
        return torch.cat([own.sigmoid() for own in self.values.split(self.counts)])


class SoftThreshold(Penalised):
    """Shrinks looked-up rows by their tables' thresholds, which it pulls up.

    Args:
        tables: the group.
        thresholds: of these tables, in order.
        pull: on each threshold, of all steps of a training together.
    """

    def __init__(
        self, tables: Sequence[TableSpec], thresholds: ElementThresholds, *, pull: float
    ) -> None:
        super().__init__()
        self.thresholds = thresholds
        self._pull = pull
        counts = thresholds.counts
        starts = [sum(counts[:n]) for n in range(len(counts))]
        self._pairs = [
            (start, start + count, table.embedding_dim)
            for table, start, count in zip(tables, starts, counts)
            for _ in table.feature_names
        ]
        self._columns = Constant(
            [
                start if stop - start == 1 else start + column
                for start, stop, dim in self._pairs
                for column in range(dim)
            ]
        )

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (R, sum of dims) -> (R, sum of dims)
        limits = self.thresholds()
        self._penalise()
        return soft_threshold(rows, limits.index_select(0, self._columns.on(rows.device)))

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        limits = self.thresholds()
        self._penalise()
        return [
            soft_threshold(part, limits[start:stop])
            for part, (start, stop, _) in zip(parts, self._pairs)
        ]

    def _penalise(self) -> None:
        self.penalty = None
        if self.training:
            pull = self._pull / (self.planned_steps or _STEPS)
            self.penalty = -pull * self.thresholds.values.sum()
