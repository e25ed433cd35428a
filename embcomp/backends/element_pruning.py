"""What methods share that train whole tables and keep their largest elements, within a number of bytes.

They end as `sparse` rows. Values, columns and row pointers all count, so that the floor is a pointer for
every id. Elements are ranked over all tables of a group together; those of ids that training never saw are
what was drawn, mean nothing, and go first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from embcomp.backends.base import BackendConfig, MethodState, full_table
from embcomp.backends.blocks import column_dtype
from embcomp.backends.pruned_elements import elements_form, least_element_bytes, most_elements
from embcomp.backends.sparse import pointer_dtype
from embcomp.io.constraints import Positive
from embcomp.layers.block_work import IN_MEMORY, Work
from embcomp.layers.id_counts import counts_of_range, was_counted
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.footprint import Footprint, TensorFootprint, footprint_of
from embcomp.tables.specs import PhysicalTable, TableSpec

_WAY_OUT = "Raise the budget, or choose a method with a lower floor (hash, unified)."


@dataclass(frozen=True, kw_only=True)
class ElementPruning(BackendConfig):
    """Single elements of trained tables, learnt and then cut to a number of bytes.

    Args:
        serve_bytes: the most that the group's serving form may take. A budget sets it.
    """

    serve_bytes: Annotated[int | None, Positive()] = None

    size_fields: ClassVar[tuple[str, ...]] = ("serve_bytes",)
    learns_size: ClassVar[bool] = True

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return False  # what a table is worth is learnt

    @override
    def holds_whole(self, table: TableSpec) -> bool:
        return True

    @override
    def stores_together(self, tables: Sequence[TableSpec]) -> bool:
        return len(tables) > 1  # they share the bytes

    @override
    def training_forms(self, tables: Sequence[TableSpec]) -> tuple[BackendConfig, ...]:
        return (self, most_elements(tables, self.serve_bytes or 0))

    def trained_rows(
        self, tables: Sequence[TableSpec], form: MethodState
    ) -> Mapping[str, RowSource]:
        """By table, (num_embeddings, embedding_dim) what ids look up in a form of this method."""
        return {table.name: form.rows(table.name) for table in tables}

    def pruned_form(
        self,
        tables: Sequence[TableSpec],
        form: MethodState,
        counts: Mapping[str, Tensor],
        *,
        initial: MethodState | None = None,
        work: Work = IN_MEMORY,
    ) -> MethodState:
        """The largest elements within `serve_bytes`, as sparse rows.

        Args:
            tables: the group.
            form: a form of this method.
            counts: for each table, (num_embeddings,) how often each id occurs; elements of ids that
                never do are not kept. Nothing is known of tables that nobody counted.
            initial: whose elements are kept in the places of the largest, in place of these.
            work: does it.

        Raises:
            BudgetError: when not even one element fits.
        """
        rows = self.trained_rows(tables, form)
        return elements_form(
            tables,
            {table.name: _seen_rows(table, rows[table.name], counts) for table in tables},
            {table.name: torch.ones(1, table.embedding_dim) for table in tables},
            {table.name: () for table in tables},
            self._most_bytes(tables) if self.serve_bytes is None else self.serve_bytes,
            None if initial is None else {t.name: initial.rows(t.name) for t in tables},
            work,
            method=self.name,
            way_out=_WAY_OUT,
        )

    @override
    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """The elements that are not zero; where these take more than `serve_bytes`, the largest of them."""
        return self.pruned_form(tables, form, form.counts, work=form.work)

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [full_table(table) for table in tables]

    def train_only(self, tables: Sequence[TableSpec]) -> Footprint:
        """What training holds beside the physical tables, none of which is served."""
        return Footprint()

    def _most_bytes(self, tables: Sequence[TableSpec]) -> int:
        """What sparse rows of all elements take."""
        elements = [table.num_embeddings * table.embedding_dim for table in tables]
        pointers = sum(table.num_embeddings + 1 for table in tables)
        column = column_dtype(tables).itemsize
        stored = sum(n * (table.itemsize + column) for n, table in zip(elements, tables))
        return stored + pointers * pointer_dtype(elements).itemsize

    @override
    def footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        self.require_size()
        served = TensorFootprint(
            name=f"{tables[0].name}.kept",
            role="weights",
            rows=1,
            columns=min(self.serve_bytes or 0, self._most_bytes(tables)),
            itemsize=1,
            train_columns=0,
            lookup=False,
            trained=False,
        )
        rows = footprint_of(self.physical_tables(tables), served=False)
        return rows + self.train_only(tables) + Footprint((served,))

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        least = least_element_bytes(tables)
        return self.with_size(serve_bytes=budget) if budget >= least else None

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self.with_size(serve_bytes=least_element_bytes(tables))


def _seen_rows(table: TableSpec, rows: RowSource, counts: Mapping[str, Tensor]) -> RowSource:
    """Rows, zeros in the place of those whose ids never occur."""
    if not was_counted(table, counts):
        return rows

    def seen(start: int, stop: int) -> Tensor:
        occurs = counts_of_range(table, counts, start, stop) > 0
        return rows.read(start, stop) * occurs.unsqueeze(1)

    return ComputedRows(rows.shape, rows.dtype, seen, of=[rows])
