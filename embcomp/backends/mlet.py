"""Multi-layer embedding training: wide rows times a matrix in training, their product as narrow rows to serve.

Ghaemmaghami, Deng, Cho, Orshansky, Singh, Erez, Orshansky, "Training with Multi-Layer Embeddings for Model
Reduction", 2020, https://arxiv.org/abs/2006.05623; Deng et al., ACML 2023, https://arxiv.org/abs/2309.15881.
`E = W1 W2` with W1 wider than E is no smaller and can say nothing more, but learns in another way: a step changes E
by `G (W2' W2) + (W1 W1') G` for a gradient G of E, whose second term moves rows that are not in the batch along their
likeness to those that are. So rare ids learn from others, through W2, while the update of W1 stays sparse.

What is served is `low_dim`: nothing of the training form is left. Training takes `factor` times its bytes, and W2
learns with the network's optimizer. A model that sees wider embeddings has zeros behind the narrow rows, as
with `low_dim` of the same width, which is the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig, MethodState
from embcomp.backends.full import FullRoute, RangeCheck
from embcomp.backends.low_dim import low_dim_form
from embcomp.io.constraints import Count, Le
from embcomp.layers.projected_rows import ProjectedRows, ProjectedTable
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.budget import largest_int
from embcomp.tables.footprint import Footprint, TensorFootprint, footprint_of
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit, by_name


@dataclass(frozen=True, kw_only=True)
class MLET(BackendConfig):
    """Narrow rows, trained as products of wider ones and a matrix. Ids must lie in `[0, num_embeddings)`.

    Args:
        width: columns of the rows that are served. A table that is no wider stays full.
        factor: how many times as wide rows are in training.
        multiple_of: a budget gives a `width` that is a multiple of this.
    """

    width: Annotated[int | None, Count(1), Le(2**16)] = None
    factor: Annotated[int, Count(1), Le(64)] = 4
    multiple_of: Annotated[int, Count(1), Le(2**16)] = 1

    name: ClassVar[str] = "mlet"
    size_fields: ClassVar[tuple[str, ...]] = ("width",)

    def _width(self, table: TableSpec) -> int:
        return min(self.width or 1, table.embedding_dim)

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return self._width(table) == table.embedding_dim

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [
            PhysicalTable(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=self.factor * self._width(table),
                lookups=tuple(LookupKey(table.name, feature) for feature in table.feature_names),
                init_fn=UniformInit.with_std(table.init_std),
                data_type=table.data_type,
            )
            for table in tables
        ]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        projected = [
            ProjectedTable(
                name=table.name,
                came=self.factor * self._width(table),
                wanted=self._width(table),
                dim=table.embedding_dim,
                has_matrix=True,
                num_features=len(table.feature_names),
            )
            for table in tables
        ]
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=FullRoute(keys, RangeCheck(tables)),
            combine=ProjectedRows(projected),
        )

    @override
    def footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        self.require_size()
        small = [table for table in tables if not self.keeps_full(table)]
        whole = [table for table in tables if self.keeps_full(table)]
        total = super().footprint(whole) if whole else Footprint()
        return (
            total
            + footprint_of(self.physical_tables(small), served=False)
            + self.dense_footprint(small)
        )

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        served = tuple(
            TensorFootprint(
                name=f"{table.name}.folded",
                role="weights",
                rows=table.num_embeddings,
                columns=self._width(table),
                itemsize=table.itemsize,
                train_columns=0,
                trained=False,
            )
            for table in tables
        )
        matrices = tuple(
            TensorFootprint(
                name=f"{table.name}.projection",
                role="projection",
                rows=self.factor * self._width(table),
                columns=self._width(table),
                itemsize=4,
                train_columns=self._width(table),
                lookup=False,
                served=False,
            )
            for table in tables
        )
        return Footprint((*served, *matrices))

    @override
    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """The products as `low_dim` rows, made block by block."""
        rows: Mapping[str, RowSource] = {
            table.name: _folded(form.rows(table.name), _matrix(form, table))
            for table in by_name(tables)
        }
        return low_dim_form(tables, rows, {}, {t.name: self._width(t) for t in tables}, form.work)

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        def fits(step: int) -> bool:
            return self._at(step).footprint(tables).serve_bytes <= budget

        widest = max(table.embedding_dim for table in tables)
        step = largest_int(fits, 1, -(-widest // self.multiple_of))
        return None if step is None else self._at(step)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self._at(1)

    def _at(self, step: int) -> Self:
        return self.with_size(width=step * self.multiple_of)


def _matrix(form: MethodState, table: TableSpec) -> Tensor:
    """(factor * width, width) what a table's rows are multiplied by."""
    name = f"combine.projections.table@{table.name}.weight"
    return form.sources[name].whole() if name in form.sources else form.tensors[name]


def _folded(rows: RowSource, matrix: Tensor) -> RowSource:
    """(N, width) products of (N, factor * width) rows and their matrix."""
    own = matrix.detach().to("cpu", torch.float32)

    def read(start: int, stop: int) -> Tensor:
        return (rows.read(start, stop).float() @ own).to(rows.dtype)

    return ComputedRows((len(rows), own.shape[1]), rows.dtype, read, of=[rows])
