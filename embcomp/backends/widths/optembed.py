"""OptEmbed: rows pruned by learnt thresholds, widths found by evolution, then trained again.

Lyu, Tang, Zhu, Guo, Zhang, Tang, Liu, "OptEmbed: Learning Optimal Embedding Table for Click-through
Rate Prediction", CIKM 2022, https://arxiv.org/abs/2208.04482. One training of a **supernet** learns
rows, a threshold per table and, with widths drawn for every sample and field, every width at once. A
**search** tries widths on it. **Retraining** starts the chosen rows and columns from their initial
weights, and they are all there is: pruned rows and columns are not stored.

Where we depart from the paper and its code:

- norms are measured in units of their mean (`embcomp.backends.widths.threshold_gate`), so that thresholds learn whatever
  the width and the initial weights are;
- thresholds are pulled up by `alpha` in each step of a training of 5,000 steps, and by more or less in
  shorter or longer ones, so that how many rows are pruned does not follow from the number of steps. With
  the paper's settings the pull is some 1e-9 a step and thresholds move by the task's gradient alone; ours,
  in units of mean norms, moves them by 1e-4, to 0.4 at the end where nothing holds against it;
- with a budget, rows are ranked by norm times count and widths are searched within the bytes; how
  many rows to keep is tried out. Without one, thresholds decide as they were learnt, and the search
  looks at the score alone: that is the paper's method;
- an id that training rows never hold is pruned. In the paper the dense optimizer's L2 pulls its row to
  zero; fused optimizers leave it as it was drawn, so its norm means nothing. Rows that are rarely
  touched need `train.row_optimizer.weight_decay` for the same reason;
- pruned ids share one row, which starts at zero and learns (`low_dim`);
- the evolution has none of the mistakes of the public code (`embcomp.backends.widths.evolution`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from embcomp.backends.base import Backend, BackendConfig, MethodState, SearchContext, StageInputs
from embcomp.backends.full import FullRoute, RangeCheck
from embcomp.backends.low_dim import LowDim, low_dim_form, pruned_bytes
from embcomp.backends.stages import Stage
from embcomp.backends.widths.evolution import Evolution, evolve
from embcomp.backends.widths.masks import WidthDraws, draws_footprint
from embcomp.backends.widths.row_ranking import RowRanking
from embcomp.backends.widths.searched_size import (
    Candidates,
    FirstCandidates,
    Rounds,
    SearchedSize,
)
from embcomp.backends.widths.supernet import Supernet, Trial
from embcomp.backends.widths.threshold_gate import Norm, relative_norms, row_norms
from embcomp.backends.widths.width_space import WidthSpace
from embcomp.io.constraints import Ge, Le
from embcomp.layers.block_work import IN_MEMORY, RowBlock, Work, row_blocks
from embcomp.layers.id_counts import counts_of_range, was_counted
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.footprint import TensorFootprint, vector_footprint
from embcomp.tables.specs import TableSpec, by_name

Prune = Literal["both", "rows", "widths"]
Importance = Literal["norm_and_count", "norm"]

_KEEP_EXPONENTS = (0.25, 0.5, 0.75)  # shares of rows to try: powers of the share of bytes
_LAWS_TRIED = (0.0, 0.2, 0.5)  # power laws of widths that each share of rows is tried with


@dataclass(frozen=True, kw_only=True)
class OptEmbed(SearchedSize):
    """Learnt rows and widths: a supernet, a search, a retraining.

    Without a budget, rows are pruned as their thresholds were learnt and widths are those that score
    best, whatever they take. With one, both are fitted into it.

    Args:
        target_bytes: serving bytes of the compressed tables together; what a budget comes to.
        prune: `rows` alone (OptEmbed-E), `widths` alone (OptEmbed-D), or both.
        norm: 1 or 2, of the rows' norms that are held against the thresholds.
        alpha: weight of `exp(-threshold)` in the loss, which pushes thresholds up; of a training of
            5,000 steps, and so much more or less of another that all steps together push alike.
        threshold_learning_rate: of the plain SGD that thresholds have to themselves.
        importance: by what a budget ranks rows: norm times count, or norm alone. Of tables whose
            ids nobody counted it is the norm alone.
        width_grid: widths that a table may have: multiples of this, or a list. Its full width is
            always among them.
        inherit: whether the retraining goes on from trained weights rather than initial ones.
        search_rows: search-validation rows that a candidate is scored on; the best are scored
            again on all of them.
        generations: of the search over widths.
        population: candidates that the search begins with.
        mutants: candidates by mutation in each generation.
        crossovers: candidates by crossover in each generation.
        seed: of the widths that are drawn.
    """

    prune: Prune = "both"
    norm: Norm = 1
    alpha: Annotated[float, Ge(0), Le(10**6)] = 1e-3
    threshold_learning_rate: Annotated[float, Ge(0), Le(10**6)] = 0.1
    importance: Importance = "norm_and_count"
    inherit: bool = False
    search_rows: Annotated[int, Ge(1)] = 200_000
    generations: Rounds = 30
    population: FirstCandidates = 20
    mutants: Candidates = 10
    crossovers: Candidates = 10
    seed: int = 2021

    name: ClassVar[str] = "optembed"

    def _evolution(self) -> Evolution:
        return Evolution(
            generations=0 if self.prune == "rows" else self.generations,
            population=self.population,
            mutants=self.mutants,
            crossovers=self.crossovers,
        )

    @override
    def choices(self, table: TableSpec) -> tuple[int, ...]:
        return (table.embedding_dim,) if self.prune == "rows" else super().choices(table)

    @override
    def least_bytes(self, table: TableSpec) -> int:
        kept = table.num_embeddings if self.prune == "widths" else 0
        return pruned_bytes(table, kept, self.choices(table)[0])

    @override
    def train_only(self, tables: Sequence[TableSpec]) -> list[TensorFootprint]:
        parts = []
        if self.prune != "widths":
            parts += [_number_each(tables, "thresholds"), _number_each(tables, "norm means")]
        if self.prune != "rows":
            parts.append(draws_footprint("optembed.draws"))
        return parts

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=FullRoute(keys, RangeCheck(tables)),
            combine=Supernet(
                tables,
                norm=self.norm,
                alpha=self.alpha,
                gates=self.prune != "widths",
                draws=None if self.prune == "rows" else self._draws(tables),
            ),
            needs_unpooled_rows=True,
            needs_context=True,
            sees_every_row=True,
        )

    def _draws(self, tables: Sequence[TableSpec]) -> WidthDraws:
        choices = [self.choices(table) for table in tables for _ in table.feature_names]
        pairs = [(table.name, feature) for table in tables for feature in table.feature_names]
        return WidthDraws(pairs, choices, None, self.seed)

    @override
    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(
                name="supernet",
                purpose="learn rows, thresholds and all widths at once",
                holds_out=True,
            ),
            Stage(
                name="search",
                purpose="choose rows and widths by search-validation rows",
                kind="search",
            ),
            Stage(
                name="retrain",
                purpose="train the chosen rows and columns alone",
                reinit_network=not self.inherit,
            ),
        )

    @override
    def training_forms(self, tables: Sequence[TableSpec]) -> tuple[BackendConfig, ...]:
        pruned = {table.name: table.num_embeddings - 1 for table in tables}
        kept = LowDim(
            widths={table.name: table.embedding_dim for table in tables},
            kept={} if self.prune == "widths" else pruned,
        )
        return (self.first_method(), kept)

    @override
    def structure_optimizer(
        self, stage: Stage, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Optimizer | None:
        return torch.optim.SGD(parameters, lr=self.threshold_learning_rate)

    @override
    def search(
        self, stage: Stage, tables: Sequence[TableSpec], context: SearchContext
    ) -> Mapping[str, Any]:
        order = self.ranking(tables, context.form, context.counts, context.work)
        trial = Trial(tables, context)
        progress = context.load() or {}
        if "kept" not in progress:
            progress["kept"] = self._choose_kept(tables, order, trial)
            context.save(progress)
        kept: int = progress["kept"]
        trial.fix_rows(order.masks(kept))

        def save(evolution: Mapping[str, Any]) -> None:
            context.save({"kept": kept, "evolution": evolution})

        space = self._space(tables, order.counts(kept))
        found = evolve(
            space,
            lambda widths: trial.score(widths, self.search_rows),
            self._evolution(),
            seed=context.seed,
            final_score=lambda widths: trial.score(widths, None),
            load=lambda: progress.get("evolution"),
            save=save,
            say=context.say,
        )
        trial.release()
        return {
            "kept": kept,
            "widths": space.named(found.widths),
            "score": found.score,
            "bytes": found.size,
            "best_so_far": list(found.best_so_far),
            "candidates": found.evaluations,
        }

    def _choose_kept(self, tables: Sequence[TableSpec], order: RowRanking, trial: Trial) -> int:
        """How many rows to keep in all tables together."""
        if self.target_bytes is None or self.prune == "widths":
            return order.most
        full = {table.name: table.embedding_dim for table in tables}
        rows_alone = order.within(self.target_bytes, full)
        if self.prune == "rows":
            assert rows_alone is not None, "a budget below the floor is refused earlier"
            return rows_alone
        narrowest = {table.name: self.choices(table)[0] for table in tables}
        at_most = order.within(self.target_bytes, narrowest)
        assert at_most is not None
        rows = sum(table.num_embeddings for table in tables)
        share = self.target_bytes / sum(table.full_bytes for table in tables)
        wanted = {min(at_most, round(share**power * rows)) for power in _KEEP_EXPONENTS}
        scores: dict[int, float] = {}
        for kept in sorted({*wanted, rows_alone or at_most}):
            trial.fix_rows(order.masks(kept))
            space = self._space(tables, order.counts(kept))
            candidates = space.power_laws(_LAWS_TRIED)
            scores[kept] = max(trial.score(widths, self.search_rows) for widths in candidates)
            trial.say(f"{kept:,} of {rows:,} rows: best score {scores[kept]:.5f}")
        return max(scores, key=lambda kept: (scores[kept], kept))

    def _space(self, tables: Sequence[TableSpec], kept: Mapping[str, int]) -> WidthSpace:
        choices = tuple(self.choices(table) for table in tables)
        return WidthSpace(
            names=tuple(table.name for table in tables),
            choices=choices,
            sizes=tuple(
                tuple(pruned_bytes(table, kept[table.name], width) for width in widths)
                for table, widths in zip(tables, choices)
            ),
            rows=tuple(kept[table.name] for table in tables),
            budget=self.target_bytes,
        )

    @override
    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        found = past.results["search"]
        order = self.ranking(tables, past.before, past.counts, past.work)
        masks = order.masks(found["kept"])
        source = past.before if self.inherit else past.initial()
        weights = {table.name: source.rows(table.name) for table in tables}
        return low_dim_form(tables, weights, masks, found["widths"], past.work)

    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """The supernet without the rows that its thresholds prune.

        Where `target_bytes` is given and this is larger, the least important rows go too, and
        columns where rows alone do not do: for those who train by themselves, without stages.
        They give `compact` the ids' counts; without, norms alone rank the rows.
        """
        weights = {table.name: form.rows(table.name) for table in tables}
        if self.target_bytes is None:
            return low_dim_form(tables, weights, self._passing(tables, form), {}, form.work)
        order = self.ranking(tables, form, form.counts)
        fewest = order.most if self.prune == "widths" else 0
        space = self._space(tables, order.counts(fewest))
        widest = space.power_law(0) or space.narrowest
        widths = space.named(widest)
        kept = order.within(self.target_bytes, widths)
        assert kept is not None, "no rows at these widths fit"
        return low_dim_form(tables, weights, order.masks(kept), widths, form.work)

    def ranking(
        self,
        tables: Sequence[TableSpec],
        form: MethodState,
        counts: Mapping[str, Tensor],
        work: Work = IN_MEMORY,
    ) -> RowRanking:
        """The order in which rows are kept, by their importance; those that thresholds prune are out.

        Args:
            tables: the group, without those that stay full.
            form: what training left.
            counts: how often each id of each table occurs; norms alone rank the rows of tables
                that nobody counted.
            work: measures the rows.
        """
        gates = self._gates(tables, form)

        known = {table.name for table in tables if was_counted(table, counts)}

        def importance(block: RowBlock) -> Tensor:
            rows = form.rows(block.table).read(block.start, block.stop)
            value = row_norms(rows.float(), self.norm).double()
            keeps = gates[block.table].passing(rows)
            if block.table in known:
                seen = counts_of_range(named[block.table], counts, block.start, block.stop)
                keeps = keeps & (seen > 0)
                if self.importance == "norm_and_count":
                    value = value * seen
            return torch.where(keeps, value, -torch.inf)

        def alike(block: RowBlock) -> Tensor:
            return torch.ones(len(block), dtype=torch.float64)

        named = {table.name: table for table in tables}
        measure = alike if self.prune == "widths" else importance
        values = {
            name: work.write(
                f"importance-{name}",
                measure,
                row_blocks(name, table.num_embeddings, table.embedding_dim),
                (table.num_embeddings,),
                torch.float64,
            )
            for name, table in named.items()
        }
        return RowRanking(tables, values, work)

    def _passing(self, tables: Sequence[TableSpec], form: MethodState) -> dict[str, RowSource]:
        """For each table, (N,) bool which rows are above the threshold; nothing without gates."""
        return {
            name: _passing_rows(form.rows(name), gate)
            for name, gate in self._gates(tables, form).items()
        }

    def _gates(self, tables: Sequence[TableSpec], form: MethodState) -> dict[str, _Gate]:
        """Each table's threshold; nothing without gates."""
        if self.prune == "widths":
            return {}
        thresholds = form.tensors["combine.thresholds.values"]
        means = form.tensors["combine.norms.means"]
        return {
            table.name: _Gate(norm=self.norm, mean=mean, limit=limit)
            for table, mean, limit in zip(by_name(tables), means, thresholds)
        }


@dataclass(frozen=True, kw_only=True)
class _Gate:
    """A table's threshold, and the mean of its norms."""

    norm: Norm
    mean: Tensor
    limit: Tensor

    def passing(self, rows: Tensor) -> Tensor:
        return relative_norms(row_norms(rows, self.norm), self.mean) - self.limit > 0


def _passing_rows(rows: RowSource, gate: _Gate) -> RowSource:
    return ComputedRows(
        (len(rows),), torch.bool, lambda a, b: gate.passing(rows.read(a, b)), of=[rows]
    )


def _number_each(tables: Sequence[TableSpec], what: str) -> TensorFootprint:
    """A float32 for each table, of which serving has no need."""
    return vector_footprint(f"optembed.{what}", "mask", len(tables))
