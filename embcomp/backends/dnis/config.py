"""DNIS and AutoSrh: which columns of an embedding which ids need, learnt by frequency block.

Cheng, Shen, Huang, "Differentiable Neural Input Search for Recommender Systems", 2020,
https://arxiv.org/abs/2006.04466, and its journal version "An Embedding Dimensionality Search
Framework for Tabular Data Prediction" (AutoSrh), TKDE 2023. Ids ranked by frequency are cut into
blocks; each block has a soft selection of the columns, in [0, 1], learnt on rows that the embeddings
do not train on, in steps that alternate with theirs. Then the table is pruned to a budget, and
retrained.

Where we depart from the authors' code, and why:

- Blocks are cut per table, and by cumulative traffic (50, 80, 90, 97 and 99.5 %): blocks of equally
  many ids put almost all look-ups into one of them. Explicit `cuts` give any others. Unseen ids
  are in the block of the id that our pipelines map them to (1), not in the last.
- Pruning keeps columns of blocks rather than single elements, so that what is left is dense and the
  column lists cost bytes per block, not per element. `structure="element"` prunes as the paper
  does, by the size of selection times weight.
- Columns are ranked by what they bring per byte: their squares times how often their block is looked
  up, over the square of their rank in the block. By their size alone, cheap blocks of rare ids would
  come before those that carry the traffic; without the rank, the ids that carry it would take all
  columns and half of the look-ups would find none.
- Retraining always follows, for as many epochs as any training, and trains what is left and
  nothing else: the serving form has no place where a pruned weight could grow back. The network
  rests during the search, so what comes out of the search is badly calibrated and is never reported.
- The search rows are left out of the warm start too, so that no selection is fitted on rows that the
  weights have seen.
- The penalty rests while what is selected fits the budget, and is a hundred times the paper's: it has
  to close columns, so that those of other blocks and tables that only mattered with them close too.
  For ever, it would close blocks whose ids a batch does not have: their gradient is its alone.
- The search hands on its last weights, not its best: with the network at rest, validation says more
  of the calibration that is lost than of the columns.
- `second_order` looks through the step on training rows that was made, by any row optimizer that
  works on whole tables (fused ones keep no gradients), where the authors' option unrolls an extra
  Adam step; both in place of a second derivative take a difference of gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig, MethodState, StageInputs
from embcomp.backends.blocks import UNRANKED, Blocks, column_dtype
from embcomp.backends.dnis.optimizer import SelectionSGD
from embcomp.backends.dnis.pruning import blocks_form, choose_columns, column_scores
from embcomp.backends.dnis.search import DNISSearch, Selection
from embcomp.backends.full import Full
from embcomp.backends.pruned_elements import elements_form, least_element_bytes, most_elements
from embcomp.backends.stages import Stage
from embcomp.errors import ConfigError
from embcomp.io.constraints import Ge, Le, Positive
from embcomp.layers.block_work import IN_MEMORY, Work
from embcomp.layers.frequency_blocks import TRAFFIC_QUANTILES, check_cuts, traffic_cuts
from embcomp.layers.id_counts import check_ranked
from embcomp.layers.row_sources import RowSource
from embcomp.tables.footprint import Footprint, TensorFootprint
from embcomp.tables.specs import PhysicalTable, TableSpec

Structure = Literal["block", "element"]


@dataclass(frozen=True, kw_only=True)
class DNIS(BackendConfig):
    """Columns by frequency block, learnt and then pruned to a number of bytes.

    Args:
        serve_bytes: the most that the group's serving form may take. A budget sets it.
        quantiles: shares of a table's look-ups at which its blocks end. Look-ups are counted in
            the training rows; where nobody counted, ids are taken to follow Zipf's law. Ids must
            be ranked by frequency, as `embcomp prepare` ranks them.
        cuts: for single tables by name, the first ids of all blocks but the first, in place of
            those that the quantiles give.
        selection: `free` learns a number for every column of a block; `prefix` one length, so
            that blocks keep their first columns.
        structure: `block` keeps columns of whole blocks, in dense tables; `element` keeps
            single weights, in sparse rows that are slower and take 4 bytes for every id.
        l1: factor of the selections' sum in the search's loss.
        search_epochs: passes over the training rows in which selections are learnt.
        learning_rate: mean size of a selection's step; its gradients are normalised.
        decay: after t steps of the search, selections' steps are `1 + decay * t` times smaller.
        second_order: whether a selection's gradient also counts what selections do to the rows' step
            before (DARTS). Two more passes on the training batch; it needs
            `train.row_optimizer.mode: dense`, and the network at rest.
        freezes_network: whether the model around the tables rests during the search.
        inherit: whether the retraining goes on from the trained weights rather than from the initial
            ones, network included. Where a second epoch over-fits, it should not.
    """

    serve_bytes: Annotated[int | None, Positive()] = None
    quantiles: tuple[float, ...] = TRAFFIC_QUANTILES
    cuts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    selection: Selection = "free"
    structure: Structure = "block"
    l1: Annotated[float, Ge(0)] = 1e-3
    search_epochs: Annotated[int, Positive(), Le(10**6)] = 1
    learning_rate: Annotated[float, Positive(), Le(10**6)] = 0.01
    decay: Annotated[float, Ge(0), Le(10**6)] = 0.0
    second_order: bool = False
    freezes_network: bool = True
    inherit: bool = True

    name: ClassVar[str] = "dnis"
    approximates: ClassVar[bool] = True
    size_fields: ClassVar[tuple[str, ...]] = ("serve_bytes",)
    learns_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for table, values in self.cuts.items():
            check_cuts(self.name, table, values, None)
        shares = (0.0, *self.quantiles, 1.0)
        if not all(low < high for low, high in itertools.pairwise(shares)):
            raise ConfigError(
                f"dnis: quantiles must rise strictly within (0, 1), got {list(self.quantiles)}"
            )
        if self.second_order and not self.freezes_network:
            raise ConfigError(
                "dnis: second_order looks through steps of the rows alone; it needs "
                "freezes_network: true"
            )

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return False  # what a table is worth is learnt

    @override
    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(name="warm", purpose="full tables and the network", holds_out=True),
            Stage(
                name="search",
                purpose="selections of columns by frequency block, on held-out rows",
                epochs=self.search_epochs,
                network=not self.freezes_network,
                alternate=True,
                second_order=self.second_order,
                holds_out=True,
                keeps="last",
            ),
            Stage(
                name="retrain",
                purpose="what is left within the budget",
                reinit_network=not self.inherit,
            ),
        )

    @override
    def first_method(self) -> BackendConfig:
        return Full()

    @override
    def training_forms(self, tables: Sequence[TableSpec]) -> tuple[BackendConfig, ...]:
        search = replace(
            self._as_search(), cuts={table.name: self._cuts(table, None) for table in tables}
        )
        return (Full(), search, self._largest_pruned(tables, search))

    def _largest_pruned(self, tables: Sequence[TableSpec], search: DNISSearch) -> BackendConfig:
        """What may be left of the tables, at the most."""
        if self.structure == "element":
            return most_elements(tables, self.serve_bytes or 0)
        widths = {
            table.name: (table.embedding_dim,) * (len(search.cuts[table.name]) + 1)
            for table in tables
        }
        return Blocks(widths=widths, cuts=search.cuts)

    @override
    def structure_optimizer(
        self, stage: Stage, parameters: Sequence[nn.Parameter]
    ) -> torch.optim.Optimizer | None:
        if stage.name != "search":
            return None
        return SelectionSGD(parameters, lr=self.learning_rate, decay=self.decay)

    @override
    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        if stage.name == "search":
            return self._search(tables, past)
        initial = None if self.inherit else past.initial()
        return self.pruned_form(tables, past.before, past.counts, initial, past.work)

    @override
    def approximate(self, tables: Sequence[TableSpec], past: StageInputs) -> MethodState:
        """Columns of blocks by what their rows weigh, as after a search that found all alike."""
        searched = self._search(tables, past)
        return self.pruned_form(tables, searched, past.counts, work=past.work)

    def _search(self, tables: Sequence[TableSpec], past: StageInputs) -> MethodState:
        self.check_ids(tables, past.counts)
        cuts = {table.name: self._cuts(table, past.counts.get(table.name)) for table in tables}
        search = replace(self._as_search(), cuts=cuts)
        tensors: dict[str, Tensor | RowSource] = {
            f"rows.{table.name}": past.before.rows(table.name) for table in tables
        }
        return MethodState.of(search, tensors | search.fresh_selections(tables))

    @property
    def needs_ranked_ids(self) -> bool:
        """Whether ids must be ranked by frequency; its blocks are ranges of ids."""
        return True

    @override
    def check_ids(self, tables: Sequence[TableSpec], counts: Mapping[str, Tensor]) -> None:
        for table in tables:
            cuts = self._cuts(table, counts.get(table.name))
            check_ranked(self.name, table, counts, cuts, UNRANKED)

    def _cuts(self, table: TableSpec, counts: Tensor | None) -> tuple[int, ...]:
        given = self.cuts.get(table.name)
        return (
            traffic_cuts(table.num_embeddings, counts, self.quantiles) if given is None else given
        )

    def pruned_form(
        self,
        tables: Sequence[TableSpec],
        searched: MethodState,
        counts: Mapping[str, Tensor] | None = None,
        initial: MethodState | None = None,
        work: Work = IN_MEMORY,
    ) -> MethodState:
        """The tables cut to `serve_bytes`, selections absorbed by the weights that are left.

        Args:
            tables: the group.
            searched: what the search left: a form of `DNISSearch`.
            counts: for each table, (num_embeddings,) how often each id occurs; all ids alike
                where nobody counted.
            initial: full tables whose weights are kept in place of the searched ones, as they are.
            work: does it.

        Raises:
            BudgetError: when not even one weight fits.
        """
        self.require_size()
        search = searched.config
        if not isinstance(search, DNISSearch):
            raise ConfigError(f"dnis: expected a form of dnis_search to prune, got {search.name}")
        budget = self.serve_bytes or 0
        selections = search.selections(tables, searched)
        rows = {table.name: searched.rows(table.name) for table in tables}
        cuts = {table.name: search.cuts_of(table) for table in tables}
        fresh = None
        if initial is not None:
            fresh = {table.name: initial.rows(table.name) for table in tables}
        if self.structure == "element":
            return elements_form(tables, rows, selections, cuts, budget, fresh, work)
        scores = {
            table.name: column_scores(
                table,
                rows[table.name],
                selections[table.name],
                cuts[table.name],
                nested=self.selection == "prefix",
                work=work,
            )
            for table in tables
        }
        chosen = choose_columns(tables, scores, cuts, budget, counts)
        own = {name: selections[name][source] for name, source in chosen.source.items()}
        if fresh is not None:
            own = {name: torch.ones_like(selection) for name, selection in own.items()}
        return blocks_form(tables, fresh or rows, own, chosen.kept, chosen.cuts, work)

    def _as_search(self) -> DNISSearch:
        """What a collection holds that was built without stages: the search from its beginning."""
        return DNISSearch(
            cuts=self.cuts, selection=self.selection, l1=self.l1, serve_bytes=self.serve_bytes
        )

    @override
    def holds_whole(self, table: TableSpec) -> bool:
        return self._as_search().holds_whole(table)

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return self._as_search().physical_tables(tables)

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        return self._as_search().build(tables)

    @override
    def footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        self.require_size()
        search = self._as_search().footprint(tables)
        trained = Footprint(tuple(tensor for tensor in search.tensors if tensor.trained))
        most = min(self.serve_bytes or 0, search.serve_bytes)
        served = TensorFootprint(
            name=f"{tables[0].name}.kept",
            role="weights",
            rows=1,
            columns=most,
            itemsize=1,
            train_columns=0,
            lookup=False,
            trained=False,
        )
        return trained + Footprint((served,))

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        return self.with_size(serve_bytes=budget) if budget >= self._least(tables) else None

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self.with_size(serve_bytes=self._least(tables))

    def _least(self, tables: Sequence[TableSpec]) -> int:
        if self.structure == "element":
            return least_element_bytes(tables)
        return min(table.itemsize for table in tables) + column_dtype(tables).itemsize

    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """Columns that the search closed cut off; nothing is pruned that still has an effect.

        Raises:
            ConfigError: where that takes more than `serve_bytes`, as before `retrain`.
        """
        compacted = self._as_search().compact(tables, form)
        found = compacted.config.footprint(tables).serve_bytes
        if self.serve_bytes is not None and found > self.serve_bytes:
            raise ConfigError(
                f"dnis: the tables take {found:,} bytes and may take {self.serve_bytes:,}: they "
                "have not been pruned. Train them in their stages, or go on with the form that "
                "DNIS.pruned_form makes."
            )
        return compacted
