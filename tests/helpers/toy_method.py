"""A method as another package would bring it: one file, on public names alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self

from embcomp.backends.base import Backend, BackendConfig
from embcomp.backends.full import RangeCheck
from embcomp.io.constraints import Ge
from embcomp.layers.routing import renamed
from embcomp.tables import LookupKey, PhysicalTable, TableSpec, UniformInit
from embcomp.tables.budget import largest_int


@dataclass(frozen=True, kw_only=True)
class Neighbours(BackendConfig):
    """Ids beside each other share a row.

    Args:
        share: how many ids have one row.
    """

    share: Annotated[int | None, Ge(1)] = None

    name: ClassVar[str] = "neighbours"
    size_fields: ClassVar[tuple[str, ...]] = ("share",)

    def rows(self, table: TableSpec) -> int:
        """Rows for a table's ids."""
        return -(-table.num_embeddings // (self.share or 1))

    def keeps_full(self, table: TableSpec) -> bool:
        return self.rows(table) == table.num_embeddings

    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [
            PhysicalTable(
                name=table.name,
                num_embeddings=self.rows(table),
                embedding_dim=table.embedding_dim,
                lookups=tuple(LookupKey(table.name, feature) for feature in table.feature_names),
                init_fn=table.init_fn or UniformInit(*table.init_bounds),
                data_type=table.data_type,
            )
            for table in tables
        ]

    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=NeighbourRoute(keys, self.share or 1, RangeCheck(tables)),
            combine=nn.Identity(),
        )

    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        most = max(table.num_embeddings for table in tables)

        def fits(step: int) -> bool:
            return self._at(most, step).footprint(tables).serve_bytes <= budget

        step = largest_int(fits, 1, most)
        return None if step is None else self._at(most, step)

    def _at(self, most: int, step: int) -> Self:
        return self.with_size(share=most + 1 - step)

    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self.with_size(share=max(table.num_embeddings for table in tables))


class NeighbourRoute(nn.Module):
    """Divides ids."""

    def __init__(self, keys: Sequence[str], share: int, check: RangeCheck) -> None:
        super().__init__()
        self._keys = list(keys)
        self._share = share
        self.check = check

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        self.check(features)
        return renamed(features, self._keys, features.values() // self._share)
