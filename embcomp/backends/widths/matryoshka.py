"""Matryoshka tables: trained once so that every prefix of an embedding is an embedding.

Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022, https://arxiv.org/abs/2205.13147,
brought to tables: in training embeddings are cut to widths and padded by zeros, so that their first
columns learn what matters most. The paper sums the losses of all widths, one forward pass each. We take
one pass, by the sandwich rule of Yu and Huang, "Universally Slimmable Networks", ICCV 2019, spread over
the samples of a step: some are whole in all fields, some cut to the least width in all, and those between
have a width drawn for each field, so that fields can have widths of their own afterwards. Drawn widths
alone would never train what an uncut table serves: 26 fields are all whole once in 10^23 samples. Which
widths, a search finds that trains nothing; they can also be given
by hand, again and again, from one training (`slice_columns`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from typing_extensions import override

from embcomp.backends.base import Backend, BackendConfig, MethodState, SearchContext, StageInputs
from embcomp.backends.full import FullRoute, RangeCheck
from embcomp.backends.low_dim import LowDim, low_dim_form
from embcomp.backends.stages import Stage
from embcomp.backends.widths.evolution import Evolution, evolve
from embcomp.backends.widths.greedy_widths import allocate_greedily
from embcomp.backends.widths.masks import WidthDraws, draws_footprint
from embcomp.backends.widths.searched_size import (
    Candidates,
    FirstCandidates,
    Rounds,
    SearchedSize,
    WidthGrid,
)
from embcomp.backends.widths.supernet import Supernet, Trial
from embcomp.backends.widths.width_space import Widths
from embcomp.errors import ConfigError
from embcomp.io.constraints import Between, Ge, Le
from embcomp.layers.block_work import Work
from embcomp.tables.footprint import TensorFootprint
from embcomp.tables.specs import TableSpec

Choose = Literal["greedy", "evolution"]


@dataclass(frozen=True, kw_only=True)
class Matryoshka(SearchedSize):
    """Nested widths, learnt in one training.

    Without a budget the tables stay whole and can be cut afterwards; with one, widths are searched
    that fit into it, and training may go on from there.

    Args:
        target_bytes: serving bytes of the compressed tables together; what a budget comes to.
        width_grid: widths that are trained and may be chosen: multiples of this, or a list. A
            table's full width is always among them.
        weights: by width, how often it is drawn in training, where others have 1.
        full_share: share of the samples that are whole in all fields.
        least_share: share of the samples that have the least width in all fields.
        choose: how widths are found: `greedy` scores each field's widths alone, `evolution`
            whole candidates.
        finetune_epochs: passes over the training rows after the widths are chosen; 0 only cuts.
            The network has learnt for all widths at once, and gains much from seeing one.
        search_rows: search-validation rows that a candidate is scored on; the best are scored
            again on all of them.
        generations: of the evolution.
        population: candidates that the evolution begins with.
        mutants: candidates by mutation in each generation.
        crossovers: candidates by crossover in each generation.
        seed: of the widths that are drawn.
    """

    width_grid: WidthGrid = 2
    weights: Annotated[Mapping[int, float], Le(10**9)] = field(default_factory=dict)
    full_share: Annotated[float, Between(0, 1, "[]")] = 0.2
    least_share: Annotated[float, Between(0, 1, "[]")] = 0.02
    choose: Choose = "greedy"
    finetune_epochs: Rounds = 1
    search_rows: Annotated[int, Ge(1)] = 200_000
    generations: Rounds = 30
    population: FirstCandidates = 20
    mutants: Candidates = 10
    crossovers: Candidates = 10
    seed: int = 2021

    name: ClassVar[str] = "matryoshka"

    def __post_init__(self) -> None:
        super().__post_init__()
        for width, weight in self.weights.items():
            if not weight > 0:
                raise ConfigError(
                    f"matryoshka: the weight of width {width} must be positive, got {weight}"
                )

        if self.full_share + self.least_share > 1:
            raise ConfigError(
                "matryoshka: full_share and least_share are shares of the same samples, together at "
                f"most 1; got {self.full_share} and {self.least_share}"
            )

    def _evolution(self) -> Evolution:
        return Evolution(
            generations=self.generations,
            population=self.population,
            mutants=self.mutants,
            crossovers=self.crossovers,
        )

    @override
    def least_bytes(self, table: TableSpec) -> int:
        return table.num_embeddings * self.choices(table)[0] * table.itemsize

    @override
    def train_only(self, tables: Sequence[TableSpec]) -> list[TensorFootprint]:
        return [draws_footprint("matryoshka.draws")]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        choices = [self.choices(table) for table in tables for _ in table.feature_names]
        weights = [[self.weights.get(width, 1.0) for width in widths] for widths in choices]
        pairs = [(table.name, feature) for table in tables for feature in table.feature_names]
        draws = WidthDraws(
            pairs,
            choices,
            weights if self.weights else None,
            self.seed,
            full=self.full_share,
            least=self.least_share,
        )
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=FullRoute(keys, RangeCheck(tables)),
            combine=Supernet(tables, draws=draws),
            needs_unpooled_rows=True,
            needs_context=True,
            sees_every_row=True,
        )

    @override
    def stages(self) -> tuple[Stage, ...]:
        if self.target_bytes is None and self.budget is None:
            return (Stage(name="nested", purpose="learn all widths at once"),)
        return (
            Stage(name="nested", purpose="learn all widths at once", holds_out=True),
            Stage(name="search", purpose="choose widths by search-validation rows", kind="search"),
            Stage(
                name="finetune",
                purpose="go on with the chosen widths alone",
                epochs=self.finetune_epochs,
            ),
        )

    @override
    def training_forms(self, tables: Sequence[TableSpec]) -> tuple[BackendConfig, ...]:
        first = self.first_method()
        if len(self.stages()) == 1:
            return (first,)
        return (first, LowDim(widths={table.name: table.embedding_dim for table in tables}))

    @override
    def search(
        self, stage: Stage, tables: Sequence[TableSpec], context: SearchContext
    ) -> Mapping[str, Any]:
        trial, space = Trial(tables, context), self.width_space(tables)

        def score(widths: Widths) -> float:
            return trial.score(widths, self.search_rows)

        def score_on_all(widths: Widths) -> float:
            return trial.score(widths, None)

        if self.choose == "greedy":
            widths, best, candidates = allocate_greedily(
                space, score, final_score=score_on_all, load=context.load, save=context.save
            )
        else:
            found = evolve(
                space,
                score,
                self._evolution(),
                seed=context.seed,
                final_score=score_on_all,
                load=context.load,
                save=context.save,
                say=context.say,
            )
            widths, best, candidates = found.widths, found.score, found.evaluations
        trial.release()
        return {
            "widths": space.named(widths),
            "score": best,
            "bytes": space.size(widths),
            "candidates": candidates,
        }

    @override
    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        return self._cut(tables, past.before, past.results["search"]["widths"], past.work)

    def slice_columns(
        self, tables: Sequence[TableSpec], form: MethodState, widths: Mapping[str, int]
    ) -> MethodState:
        """Trained tables cut to any widths, ready to serve or to train on.

        Args:
            tables: the group.
            form: of this method.
            widths: by table; tables that are not named stay whole.

        Raises:
            ConfigError: for a table that is not there, or a width that it has not.
        """
        dims = {table.name: table.embedding_dim for table in tables}
        for name, width in widths.items():
            if name not in dims:
                raise ConfigError(
                    f"matryoshka: no table {name!r} to cut; there are {', '.join(dims)}"
                )
            if isinstance(width, bool) or not isinstance(width, int):
                raise ConfigError(f"matryoshka: width of {name!r} must be whole, got {width!r}")
            if not 1 <= width <= dims[name]:
                raise ConfigError(
                    f"matryoshka: table {name!r} has widths from 1 to {dims[name]}, got {width}"
                )
        return self._cut(tables, form, widths, form.work)

    @staticmethod
    def _cut(
        tables: Sequence[TableSpec], form: MethodState, widths: Mapping[str, int], work: Work
    ) -> MethodState:
        weights = {table.name: form.rows(table.name) for table in tables}
        return low_dim_form(tables, weights, {}, widths, work)

    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """Whole tables without the machinery of training.

        Where `target_bytes` is given, each table is cut to one share of its width instead: for
        those who train by themselves, without stages.
        """
        space = self.width_space(tables)
        widths = space.widest if space.budget is None else space.power_law(0) or space.narrowest
        return self.slice_columns(tables, form, space.named(widths))
