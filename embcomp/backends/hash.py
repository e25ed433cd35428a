"""The hashing trick, one table per logical table: each id to one row of a shorter table.

Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009,
https://arxiv.org/abs/0902.2206. Ids of a table that meet in a row are merged for good; this is the
baseline that better methods must beat. We hash ids (SplitMix64, salted by the table's name) where common
code takes them modulo the rows: the latter never merges two frequent ids when ids are ranked by
frequency, which is a silent use of that ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from typing_extensions import override

from embcomp.backends.base import Backend
from embcomp.backends.hashed_rows import HashedRows, SizedByRows
from embcomp.layers.hashing import table_salt
from embcomp.layers.routing import HashRoute
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit


@dataclass(frozen=True, kw_only=True)
class Hash(SizedByRows, HashedRows):
    """One hashed row per id, in a table of its own for each logical table.

    Args:
        num_buckets: rows of every compressed table.
        ratio: rows as a share of `num_embeddings`, rounded down, at least 1.
        collisionless: tables of at most this many rows stay full.
        seed: salts the hash.
    """

    seed: int = 2021

    name: ClassVar[str] = "hash"

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
