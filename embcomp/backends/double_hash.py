"""Frequency double hashing: private rows for the most frequent ids, sums of two hashed rows for the rest.

Zhang, Liu, Xie, Ktena, Tejani, Gupta, Myana, Dilipkumar, Paul, Ihara, Upadhyaya, Huszar, Shi, "Model Size
Reduction Using Frequency Based Double Hashing for Recommender Systems", RecSys 2020,
https://arxiv.org/abs/2007.14523. Two rare ids are one only where both of their rows are the same, which
is as likely as meeting in a table of the square of the shared rows; frequent ids meet nobody.

Where we depart from public code: a private id reads its row once (there its two codes are the same row,
which is counted twice, in the embedding and in the gradient); and hashes are salted SplitMix64, where a
universal hash of large factors wraps around. Private rows start with the deviation of shared ones, half of a
full table's variance, as the rows of a physical table start alike on every shard. Which ids are the
most frequent follows from their numbers: the first, as prepared datasets have them, and what was counted is
checked for it; a list of ids would cost 4 bytes for each private row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.backends.base import Backend
from embcomp.backends.hash import Hash
from embcomp.io.constraints import Between
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.fused_lookups import FusedRoutes, HashedBeyond, RowWithin
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.id_counts import check_ranked
from embcomp.layers.routing import beside_ids
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit


@dataclass(frozen=True, kw_only=True)
class DoubleHash(Hash):
    """A row of its own for each of the first ids, two hashed rows for every other id.

    Args:
        num_buckets: rows of every compressed table, private and shared ones.
        ratio: rows as a share of `num_embeddings`, rounded down, at least 1.
        private_share: share of these rows that are private, rounded down; 0 hashes every id twice.
        collisionless: tables of at most this many rows stay full.
        seed: salts the hashes.
    """

    private_share: Annotated[float, Between(0, 1, "[)")] = 0.5

    name: ClassVar[str] = "double_hash"
    hashes_ids: ClassVar[bool] = False
    """Ids that are hashes of values have no first ones, which would be the most frequent."""

    def private_rows(self, table: TableSpec) -> int:
        """How many of a table's ids have a row of their own, the first ones."""
        return int(self.rows(table) * self.private_share)

    @property
    @override
    def needs_ranked_ids(self) -> bool:
        return self.private_share > 0

    @override
    def check_ids(self, tables: Sequence[TableSpec], counts: Mapping[str, Tensor]) -> None:
        way_out = (
            "They are to have rows of their own; number ids by falling frequency, as embcomp prepare "
            "does, or set private_share: 0"
        )
        for table in tables:
            if private := self.private_rows(table):
                check_ranked(self.name, table, counts, (private,), way_out)

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [
            PhysicalTable(
                name=table.name,
                num_embeddings=self.rows(table),
                embedding_dim=table.embedding_dim,
                lookups=tuple(LookupKey(table.name, feature) for feature in table.feature_names),
                init_fn=UniformInit.with_std(table.init_std / 2**0.5),
                data_type=table.data_type,
            )
            for table in tables
        ]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        owners = [table for table in tables for _ in table.feature_names]
        private = [self.private_rows(table) for table in owners]
        route = DoubleHashRoute(
            keys,
            salts=[
                (table_salt(self.seed, t.name, 0), table_salt(self.seed, t.name, 1)) for t in owners
            ],
            private=private,
            shared=[self.rows(table) - first for table, first in zip(owners, private)],
        )
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=route,
            combine=nn.Identity(),
            ids_per_value=2,
            skips_negative_ids=True,
        )


class DoubleHashRoute(nn.Module):
    """Sends the first ids to rows of their own, and every other id to two of the rows behind those.

    Args:
        keys: names of the look-ups, one for each (table, feature).
        salts: for each look-up, its two signed 64-bit salts.
        private: for each look-up, how many ids have a row of their own.
        shared: for each look-up, the rows behind those.
    """

    def __init__(
        self,
        keys: Sequence[str],
        salts: Sequence[tuple[int, int]],
        private: Sequence[int],
        shared: Sequence[int],
    ) -> None:
        super().__init__()
        self._keys = list(keys)
        self._constants = Constant.stacked(
            *(Constant(each) for each in zip(*salts)), Constant(private), Constant(shared)
        )
        self._fused = FusedRoutes(
            by_key={
                key: [
                    RowWithin(low=0, high=first),
                    *(HashedBeyond(salt=salt, num_rows=rows, first=first) for salt in pair),
                ]
                for key, pair, first, rows in zip(keys, salts, private, shared)
            },
            limits=[None] * len(keys),
        )

    def fused_routes(self) -> FusedRoutes:
        """A row of its own, or the sum of two hashed ones, of any id."""
        return self._fused

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        ids, own = beside_ids(features, self._constants)
        rows = _rows(ids, own[:2], private=own[2], shared=own[3])
        weights = features.weights_or_none()
        return KeyedJaggedTensor(
            keys=self._keys,
            values=rows.view(-1),
            weights=None if weights is None else weights.repeat_interleave(2),
            lengths=features.lengths() * 2,
            stride=features.stride(),
            length_per_key=[2 * length for length in features.length_per_key()],
        )


def _rows(ids: Tensor, salts: Tensor, *, private: Tensor, shared: Tensor) -> Tensor:
    """The two rows of each id; of a private one the second is -1, for none.

    Args:
        ids: int64, of any shape.
        salts: two, broadcastable to ids each.
        private: broadcastable to ids.
        shared: broadcastable to ids.

    Returns:
        (*ids.shape, 2) int64.
    """
    first, second = hash_rows(ids, salts, shared).add_(private)
    is_private = (ids >= 0) & (ids < private)
    return torch.stack(
        (torch.where(is_private, ids, first), torch.where(is_private, -1, second)), dim=-1
    )
