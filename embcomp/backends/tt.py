"""Tensor trains: a row is the product of three small matrices, each chosen by a digit of its id.

Yin, Acun, Liu, Wu, "TT-Rec: Tensor Train Compression for Deep Learning Recommendation Models", MLSys 2021,
https://arxiv.org/abs/2101.11714. With `n <= p1 p2 p3` ids and `D <= q1 q2 q3` columns, id `(i1, i2, i3)` in mixed
radix has the row `G1[i1] G2[i2] G3[i3]`, whose factors are of the shapes `(q1, r)`, `(r, q2 r)` and `(r, q3)`. So `p1 +
p2 + p3` rows stand for `n`, and every id has a row of its own. The cores are physical tables: TorchRec shards, fuses
and trains them. Products are not linear in the rows, so that bags are multiplied out id by id.

Where we depart from the paper and public code: cores start so that products have the variance of the full table whatever
the rank (theirs cuts small numbers out of a Gaussian, of a deviation that leaves the rank out); a width that three
factors do not make has one factor as long as it must be; and products of ids that come twice in a batch are made
twice. Ids that share digits share cores, so that the numbering of ids matters; the first digit is the lowest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig
from embcomp.backends.full import RangeCheck
from embcomp.io.constraints import Ge, Le
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.routing import RepeatFeatures, beside_ids, renamed
from embcomp.tables.budget import largest_int
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit

_CORES = 3
_MOST_RANK = 4096


@dataclass(frozen=True, kw_only=True)
class TT(BackendConfig):
    """Rows as products of three cores' rows. Ids must lie in `[0, num_embeddings)`.

    Args:
        rank: `r`. A table that cores do not shrink stays full.
    """

    rank: Annotated[int | None, Ge(1), Le(_MOST_RANK)] = None

    name: ClassVar[str] = "tt"
    size_fields: ClassVar[tuple[str, ...]] = ("rank",)

    def _core_widths(self, table: TableSpec) -> tuple[int, int, int]:
        rank, (first, second, third) = self.rank or 1, column_factors(table.embedding_dim)
        return first * rank, rank * second * rank, rank * third

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        sizes = zip(row_factors(table.num_embeddings), self._core_widths(table))
        weights = sum(rows * width for rows, width in sizes)
        return weights >= table.num_embeddings * table.embedding_dim

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [
            PhysicalTable(
                name=f"{table.name}__core_{core}",
                num_embeddings=rows,
                embedding_dim=width,
                lookups=tuple(
                    LookupKey(table.name, feature, core) for feature in table.feature_names
                ),
                init_fn=UniformInit.with_std((table.init_std / (self.rank or 1)) ** (1 / _CORES)),
                data_type=table.data_type,
            )
            for table in tables
            for core, (rows, width) in enumerate(
                zip(row_factors(table.num_embeddings), self._core_widths(table))
            )
        ]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        owners = [table for table in tables for _ in table.feature_names]
        keys = [
            str(LookupKey(table.name, feature, core))
            for table in tables
            for feature in table.feature_names
            for core in range(_CORES)
        ]
        return Backend(
            physical_tables=self.physical_tables(tables),
            keys=keys,
            route=DigitsRoute(
                keys, RangeCheck(tables), [row_factors(table.num_embeddings) for table in owners]
            ),
            combine=CoreProducts(
                [column_factors(table.embedding_dim) for table in owners],
                self.rank or 1,
            ),
            needs_unpooled_rows=True,
        )

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        def fits(rank: int) -> bool:
            return self.with_size(rank=rank).footprint(tables).serve_bytes <= budget

        rank = largest_int(fits, 1, _MOST_RANK)
        return None if rank is None else self.with_size(rank=rank)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self.with_size(rank=1)


def row_factors(count: int) -> tuple[int, int, int]:
    """Numbers of about one size whose product is at least `count`: rows of the cores."""
    first = round(count ** (1 / _CORES))
    while first**_CORES < count:
        first += 1
    while first > 1 and (first - 1) ** _CORES >= count:
        first -= 1
    left = -(-count // first)
    second = isqrt(left - 1) + 1
    return first, second, -(-left // second)


def column_factors(dim: int) -> tuple[int, int, int]:
    """Numbers of about one size whose product is a width, the least in the middle, where it costs most."""
    triples = [
        (first, second, dim // (first * second))
        for first in range(1, dim + 1)
        if dim % first == 0
        for second in range(1, first + 1)
        if (dim // first) % second == 0 and second <= dim // (first * second)
    ]
    return min(triples, key=lambda triple: (sum(triple), triple))


class DigitsRoute(nn.Module):
    """The digits of an id in mixed radix, each under a key of its own, the lowest first.

    Args:
        keys: names of the look-ups, three for each (table, feature).
        check: refuses ids that are out of range.
        factors: for each (table, feature), how many values its digits have.
    """

    def __init__(
        self, keys: Sequence[str], check: nn.Module, factors: Sequence[tuple[int, int, int]]
    ) -> None:
        super().__init__()
        self.check = check
        self._keys = list(keys)
        self.copies = RepeatFeatures(keys, [source // _CORES for source in range(len(keys))])
        places = [[*accumulate(each[:-1], int.__mul__, initial=1)] for each in factors]
        self._constants = Constant.stacked(
            Constant([place for each in places for place in each]),
            Constant([factor for each in factors for factor in each]),
        )

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        copies = self.copies(self.check(features))
        ids, (places, factors) = beside_ids(copies, self._constants)
        digits = ids.div(places, rounding_mode="floor").remainder_(factors)
        return renamed(copies, self._keys, digits.view(-1))


class CoreProducts(nn.Module):
    """Multiplies each feature's three cores.

    Args:
        factors: for each (table, feature), the factors of its width.
        rank: of the cores.
    """

    def __init__(self, factors: Sequence[tuple[int, int, int]], rank: int) -> None:
        super().__init__()
        self._factors, self._rank = list(factors), rank
        self._widths = [
            first * rank + rank * second * rank + rank * third for first, second, third in factors
        ]

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (B, sum of cores' widths) -> (B, sum of widths)
        if len(set(self._factors)) > 1:
            return torch.cat(self._products(rows.split(self._widths, dim=1)), dim=1)
        apart = rows.reshape(-1, self._widths[0])  # (B * F, cores' width)
        return self._product(apart, self._factors[0]).view(rows.shape[0], -1)

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        return self._products(parts)

    def _products(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [self._product(part, each) for part, each in zip(parts, self._factors)]

    def _product(self, rows: Tensor, factors: tuple[int, int, int]) -> Tensor:
        """(N, width) of (N, cores' width)."""
        rank, (first, second, third) = self._rank, factors
        head, middle, tail = rows.split([first * rank, rank * second * rank, rank * third], dim=1)
        left = torch.bmm(head.reshape(-1, first, rank), middle.reshape(-1, rank, second * rank))
        whole = torch.bmm(left.view(-1, first * second, rank), tail.reshape(-1, rank, third))
        return whole.reshape(-1, first * second * third)
