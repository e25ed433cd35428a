"""The hashing trick, one table per logical table: each id to one row of a shorter table.

Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009,
https://arxiv.org/abs/0902.2206. Ids of a table that meet in a row are merged for good; this is the
baseline that better methods must beat. We hash ids (SplitMix64, salted by the table's name) where common
code takes them modulo the rows: the latter never merges two frequent ids when ids are ranked by
frequency, which is a silent use of that ranking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn
from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig, FollowedForm, MethodState
from embcomp.io.constraints import Between, Ge
from embcomp.layers.block_work import Work
from embcomp.layers.followed_ids import FollowedIds
from embcomp.layers.hashing import table_salt
from embcomp.layers.routing import HashRoute
from embcomp.tables.budget import largest_int
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit

_RATIO_STEPS = 1 << 40  # a ratio is a multiple of this one's inverse, so it is an exact float


@dataclass(frozen=True, kw_only=True)
class Hash(BackendConfig):
    """One hashed row per id, in a table of its own for each logical table.

    Args:
        num_buckets: rows of every compressed table.
        ratio: rows as a share of `num_embeddings`, rounded down, at least 1.
        collisionless: tables of at most this many rows stay full.
        seed: salts the hash.
    """

    num_buckets: Annotated[int | None, Ge(1)] = None
    ratio: Annotated[float | None, Between(0, 1, "(]")] = None
    collisionless: Annotated[int, Ge(0)] = 100
    seed: int = 2021

    name: ClassVar[str] = "hash"
    hashes_ids: ClassVar[bool] = True
    hashes_small: ClassVar[bool] = True
    size_fields: ClassVar[tuple[str, ...]] = ("num_buckets", "ratio")

    def rows(self, table: TableSpec) -> int:
        """Rows of the hashed table that stands for `table`."""
        if self.ratio is not None:
            return max(1, int(table.num_embeddings * self.ratio))
        return self.num_buckets or 1

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return (
            table.num_embeddings <= self.collisionless or self.rows(table) >= table.num_embeddings
        )

    @override
    def joins(self, tables: Sequence[TableSpec]) -> bool:
        return False

    @override
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

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        owners = [table for table in tables for _ in table.feature_names]
        route = HashRoute(
            keys,
            sources=range(len(keys)),
            salts=[table_salt(self.seed, table.name) for table in owners],
            num_rows=[self.rows(table) for table in owners],
        )
        return Backend(physical_tables=physical, keys=keys, route=route, combine=nn.Identity())

    @property
    @override
    def needs_same_numbers(self) -> bool:
        return True

    @override
    def follow_ids(
        self,
        tables: Sequence[TableSpec],
        earlier: MethodState,
        earlier_tables: Sequence[TableSpec],
        ids: Mapping[str, FollowedIds],
        work: Work,
    ) -> FollowedForm:
        return FollowedForm(config=self)

    def _at(self, step: int) -> Self:
        return self.with_size(ratio=step / _RATIO_STEPS)

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        def fits(step: int) -> bool:
            return self._at(step).footprint(tables).serve_bytes <= budget

        step = largest_int(fits, 1, _RATIO_STEPS)
        return None if step is None else self._at(step)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self._at(1)
