"""Mixed dimensions: the longer a table, the narrower its rows, which a matrix of its own widens.

Ginart, Naumov, Mudigere, Yang, Zou, "Mixed Dimension Embeddings with Application to Memory-Efficient
Recommendation Systems", ISIT 2021, https://arxiv.org/abs/1909.11810: ids of long tables are less popular
each, and take fewer columns, `d = D (reference / n) ** alpha` of them.

Where we depart from the paper and its code: the table of `reference` rows that has full width is a setting,
not the group's shortest, so that widths do not change when a table is added; a table whose matrix would cost more
than its narrow rows save stays full, and matrices are billed (public code leaves them out of the ratio that it
reports); rows have the deviation of the full table's and matrices keep it (public code draws both from one tiny
range, so that their product starts all but frozen).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig
from embcomp.backends.full import FullRoute, RangeCheck
from embcomp.io.constraints import Between, Ge
from embcomp.layers.projected_rows import ProjectedRows, ProjectedTable
from embcomp.tables.budget import largest_int
from embcomp.tables.footprint import Footprint, TensorFootprint
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit

_STEEPEST = 8  # with it, a table of twice the reference's rows has a 256th of the width
_STEPS = 1 << 40  # of alpha, so that it is an exact float


@dataclass(frozen=True, kw_only=True)
class MDE(BackendConfig):
    """Widths that fall with a power of the number of rows. Ids must lie in `[0, num_embeddings)`.

    Args:
        alpha: the power; 0 gives every table its full width.
        reference: tables of at most so many rows have full width.
        power_of_two: whether widths are rounded down to powers of two.
    """

    alpha: Annotated[float | None, Between(0, _STEEPEST)] = None
    reference: Annotated[int, Ge(1)] = 100
    power_of_two: bool = False

    name: ClassVar[str] = "mde"
    size_fields: ClassVar[tuple[str, ...]] = ("alpha",)

    def width(self, table: TableSpec) -> int:
        """Columns of a table's rows; its full width where narrower ones would not save bytes."""
        dim, rows = table.embedding_dim, table.num_embeddings
        share = min(1.0, self.reference / rows) ** (self.alpha or 0.0)
        width = min(dim, max(1, round(dim * share)))
        if self.power_of_two:
            width = 1 << (width.bit_length() - 1)
        narrow = rows * width * table.itemsize + 4 * width * dim
        return width if narrow < table.full_bytes else dim

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return self.width(table) == table.embedding_dim

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [
            PhysicalTable(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=self.width(table),
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
                came=self.width(table),
                wanted=table.embedding_dim,
                dim=table.embedding_dim,
                has_matrix=not self.keeps_full(table),
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
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        return Footprint(
            tuple(
                TensorFootprint(
                    name=f"{table.name}.projection",
                    role="projection",
                    rows=self.width(table),
                    columns=table.embedding_dim,
                    itemsize=4,
                    train_columns=table.embedding_dim,
                    lookup=False,
                )
                for table in tables
                if not self.keeps_full(table)
            )
        )

    def _at(self, step: int) -> Self:
        return self.with_size(alpha=_STEEPEST * (1 - step / _STEPS))

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        def fits(step: int) -> bool:
            return self._at(step).footprint(tables).serve_bytes <= budget

        step = largest_int(fits, 0, _STEPS)
        return None if step is None else self._at(step)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self._at(0)
