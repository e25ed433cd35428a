"""AutoDim: a width for each table, found by a mixture of widths that learns on held-out rows.

Zhao, Liu, Liu, Liu, Guo, Shi, Wang, Gao, Long, "AutoDim: Field-aware Embedding Dimension Search in Recommender
Systems", WWW 2021, https://arxiv.org/abs/2006.14827. While tables train, an embedding is the sum of its candidates, one
for each width, weighted by a softmax with Gumbel noise over what its table has learnt; each step on training rows is
followed by one on held-out rows, in which the weights alone learn. The widths that are found are trained again from the
beginning.

Where we depart from the paper and its code:

- the candidates of a table are prefixes of one row, padded by zeros, which is the paper's sharing of weights;
  what is served are narrow rows padded by zeros (`low_dim`), so that no matrix widens a candidate and no batch
  normalisation follows it. All candidates together take one table, where public code has one for each;
- a column then counts as much as all the widths that have it weigh together, and bags are pooled before;
- with a budget, the widths are the most likely ones that fit, all tables together; the paper takes each table's likeliest,
  whatever they take. So they are here without one;
- the weights' gradient does not look through the rows' step (the paper's first order);
- the softmax cools to a tenth of its first temperature half-way through the search, whatever its length (noise is drawn
  anew for training and for held-out rows); public code goes by the samples seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from embcomp.backends.base import Backend, BackendConfig, MethodState, StageInputs
from embcomp.backends.full import FullRoute, RangeCheck
from embcomp.backends.low_dim import LowDim, low_dim_form
from embcomp.backends.stages import Stage
from embcomp.backends.widths.greedy_widths import allocate_greedily
from embcomp.backends.widths.masks import draws_footprint
from embcomp.backends.widths.searched_size import SearchedSize, WidthGrid
from embcomp.backends.widths.width_mixture import MixedTable, WidthMixture, column_shares
from embcomp.backends.widths.width_space import Widths
from embcomp.io.constraints import Between, Le, Positive
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.footprint import TensorFootprint, vector_footprint
from embcomp.tables.specs import TableSpec, by_name


@dataclass(frozen=True, kw_only=True)
class AutoDim(SearchedSize):
    """Widths of tables, learnt as weights of a mixture, then trained alone. Ids must lie in `[0, num_embeddings)`.

    Args:
        target_bytes: serving bytes of the compressed tables together; what a budget comes to. Without, each
            table has its likeliest width.
        width_grid: widths that a table may have: multiples of this, or a list. Its full width is
            always among them.
        weight_learning_rate: of the plain SGD that the mixture's weights have to themselves.
        temperature: of the softmax over widths when the search begins.
        seed: of the noise.
    """

    width_grid: WidthGrid = 2
    weight_learning_rate: Annotated[float, Positive(), Le(10**6)] = 1.0
    temperature: Annotated[float, Between(0, 1000, "(]")] = 1.0
    seed: int = 2021

    name: ClassVar[str] = "autodim"

    @override
    def least_bytes(self, table: TableSpec) -> int:
        return table.num_embeddings * self.choices(table)[0] * table.itemsize

    @override
    def train_only(self, tables: Sequence[TableSpec]) -> list[TensorFootprint]:
        weights = [
            vector_footprint(f"{table.name}.widths", "mask", len(self.choices(table)))
            for table in tables
        ]
        return [*weights, draws_footprint("autodim.draws")]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        mixed = [
            MixedTable(
                name=table.name,
                dim=table.embedding_dim,
                widths=self.choices(table),
                num_features=len(table.feature_names),
            )
            for table in tables
        ]
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=FullRoute(keys, RangeCheck(tables)),
            combine=WidthMixture(mixed, temperature=self.temperature, seed=self.seed),
        )

    @override
    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(
                name="search",
                purpose="rows of all widths at once, and on held-out rows what each width weighs",
                alternate=True,
                holds_out=True,
                keeps="last",
            ),
            Stage(name="retrain", purpose="the chosen widths alone", reinit_network=True),
        )

    @override
    def training_forms(self, tables: Sequence[TableSpec]) -> tuple[BackendConfig, ...]:
        widest = LowDim(widths={table.name: table.embedding_dim for table in tables})
        return (self.first_method(), widest)

    @override
    def structure_optimizer(
        self, stage: Stage, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Optimizer | None:
        if stage.name != "search":
            return None
        return torch.optim.SGD(parameters, lr=self.weight_learning_rate)

    @override
    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        widths = self.chosen_widths(tables, past.before)
        initial = past.initial()
        rows = {table.name: initial.rows(table.name) for table in tables}
        return low_dim_form(tables, rows, {}, widths, past.work)

    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """Rows whose columns are multiplied by what the mixture weighs them.

        Where `target_bytes` is given, columns are cut off too: for those who train by themselves, without stages.
        """
        widths = {}
        if self.target_bytes is not None:
            widths = self.chosen_widths(tables, form)
        weights = self._weights(tables, form)
        rows = {
            table.name: _weighted(
                form.rows(table.name),
                column_shares(weights[table.name], self.choices(table), table.embedding_dim),
            )
            for table in tables
        }
        return low_dim_form(tables, rows, {}, widths, form.work)

    def chosen_widths(self, tables: Sequence[TableSpec], form: MethodState) -> dict[str, int]:
        """The likeliest widths within `target_bytes`, by table.

        Args:
            tables: the group, without those that stay full.
            form: a form of this method.
        """
        weights = self._weights(tables, form)
        logs = [
            dict(zip(self.choices(table), weights[table.name].double().log_softmax(0).tolist()))
            for table in tables
        ]
        space = self.width_space(tables)
        likeliest = tuple(max(each, key=lambda width: (each[width], -width)) for each in logs)
        if not space.fits(likeliest):

            def score(widths: Widths) -> float:
                return sum(each[width] for each, width in zip(logs, widths))

            likeliest, _, _ = allocate_greedily(space, score)
        return space.named(likeliest)

    def _weights(self, tables: Sequence[TableSpec], form: MethodState) -> dict[str, Tensor]:
        """By table, (widths,) what the mixture has learnt."""
        own = by_name(tables)
        values = form.tensors["combine.weights.values"].detach().cpu()
        parts = values.split([len(self.choices(table)) for table in own])
        return {table.name: part for table, part in zip(own, parts)}


def _weighted(rows: RowSource, shares: Tensor) -> RowSource:
    """Rows (N, D) times shares (D,) of their columns."""
    own = shares.to(rows.dtype)
    return ComputedRows(rows.shape, rows.dtype, lambda a, b: rows.read(a, b) * own, of=[rows])
