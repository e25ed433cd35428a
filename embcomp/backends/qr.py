"""Quotient-remainder embeddings: two short tables, indexed by `id // c` and `id % c`.

Shi, Mudigere, Naumov, Yang, "Compositional Embeddings Using Complementary Partitions for
Memory-Efficient Recommendation Systems", KDD 2020, https://arxiv.org/abs/1909.02107. Every id
keeps an embedding of its own, of `ceil(n / c) + c` rows in all.

Where we depart from public code: quotients are integer divisions (a float division puts ids above
2**24 in wrong rows); bags are multiplied row by row and then pooled, not pooled and multiplied;
and the initial weights of a product are centred, with the variance of the table they stand for.
Both parts live in one physical table, the remainders after the quotients, so that added parts are
one bag of two rows and cost neither a combination nor a second output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig, FollowedForm, FollowInputs
from embcomp.backends.full import RangeCheck
from embcomp.io.constraints import Ge
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.followed_ids import FollowedIds, RowMove
from embcomp.layers.fused_lookups import (
    FusedEmbedding,
    FusedRoutes,
    IdRoute,
    PlacedRow,
    QuotientRow,
    RemainderRow,
    fitted,
    side_by_side,
)
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.routing import RepeatFeatures, beside_ids, common_count, per_value, renamed
from embcomp.layers.row_sources import ComputedRows
from embcomp.tables.budget import largest_int
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit

Combination = Literal["mult", "add", "concat"]

CHUNK = 1024
"""Samples whose gradients are multiplied at a time: few enough to stay in the cache."""


_COUNTS_AT_ONCE = 1 << 18  # of ids that are added up together


@dataclass(frozen=True, kw_only=True)
class QR(BackendConfig):
    """Quotient and remainder rows, multiplied, added or concatenated.

    Args:
        divisor: `c`; of `n` rows `ceil(n / c) + c` remain, at best `2 sqrt(n)` of them. A
            table that this does not shrink stays full.
        combine: how a quotient's and a remainder's row make an embedding. `concat` gives each
            half of the width.
    """

    divisor: Annotated[int | None, Ge(1)] = None
    combine: Combination = "mult"

    name: ClassVar[str] = "qr"
    size_fields: ClassVar[tuple[str, ...]] = ("divisor",)

    def _width(self, table: TableSpec) -> int:
        return -(-table.embedding_dim // 2) if self.combine == "concat" else table.embedding_dim

    def _quotients(self, table: TableSpec) -> int:
        return -(-table.num_embeddings // (self.divisor or 1))

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        rows = self._quotients(table) + (self.divisor or 1)
        return rows * self._width(table) >= table.num_embeddings * table.embedding_dim

    @override
    def joins(self, tables: Sequence[TableSpec]) -> bool:
        return False

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [
            PhysicalTable(
                name=table.name,
                num_embeddings=self._quotients(table) + (self.divisor or 1),
                embedding_dim=self._width(table),
                lookups=tuple(
                    LookupKey(table.name, feature, part)
                    for feature in table.feature_names
                    for part in range(1 if self.combine == "add" else 2)
                ),
                init_fn=self._init(table),
                data_type=table.data_type,
            )
            for table in tables
        ]

    def _init(self, table: TableSpec) -> UniformInit:
        std = {
            "mult": table.init_std**0.5,  # the product's deviation is the square of a factor's
            "add": table.init_std / 2**0.5,
            "concat": table.init_std,
        }[self.combine]
        return UniformInit.with_std(std)

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        owners = [table for table in tables for _ in table.feature_names]
        quotients = [self._quotients(table) for table in owners]
        check = RangeCheck(tables)
        divisor = self.divisor or 1
        widths = [(self._width(table), table.embedding_dim) for table in owners]
        if self.combine == "add":
            route: nn.Module = BagOfTwoRoute(keys, check, divisor, quotients)
            combine: nn.Module = nn.Identity()
        else:
            route = TwoKeysRoute(keys, check, divisor, quotients)
            product = self.combine == "mult"
            combine = Product(widths) if product else ConcatenatedHalves(widths)
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=route,
            combine=combine,
            needs_unpooled_rows=self.combine == "mult",
            ids_per_value=2 if self.combine == "add" else 1,
        )

    @property
    @override
    def needs_same_numbers(self) -> bool:
        return True

    @override
    def follow_ids(self, past: FollowInputs) -> FollowedForm:
        moves = {}
        for table, before in zip(past.tables, past.tables_before):
            there, here = self._quotients(before), self._quotients(table)
            moves[table.name] = _followed(past.ids[table.name], there, here, self.divisor or 1)
        return FollowedForm(config=self, moves=moves)

    def _bytes_by_divisor(self, tables: Sequence[TableSpec]) -> np.ndarray:
        """Serving bytes for the divisors 1, 2, ..., ceil(sqrt(rows of the longest table))."""
        longest = max(table.num_embeddings for table in tables)
        divisors = np.arange(1, int(longest**0.5) + 2, dtype=np.int64)
        total = np.zeros_like(divisors)
        for table in tables:
            row = self._width(table) * table.itemsize
            rows = -(-table.num_embeddings // divisors) + divisors
            total += np.minimum(rows * row, table.full_bytes)
        return total

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        def size(divisor: int) -> int:
            return self.with_size(divisor=divisor).footprint(tables).serve_bytes

        sizes = self._bytes_by_divisor(tables)
        fitting = np.where(sizes <= budget, sizes, -1)
        best = int(fitting.argmax()) + 1  # the first of equals: the smallest divisor
        if fitting[best - 1] < 0:
            return None
        # Beyond the root, bytes never fall as the divisor grows, and they grow in finer steps.
        longest = max(table.num_embeddings for table in tables)
        above = largest_int(lambda divisor: size(divisor) <= budget, len(sizes), longest)
        if above is not None and size(above) > size(best):
            best = above
        return self.with_size(divisor=best)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self.with_size(divisor=int(self._bytes_by_divisor(tables).argmin()) + 1)


def _followed(ids: FollowedIds, there: int, here: int, divisor: int) -> RowMove:
    """Where a table's quotients and remainders come from.

    Args:
        ids: where its ids come from, all at their old numbers.
        there: how many quotients the earlier table had.
        here: how many it has today.
        divisor: how many remainders.
    """

    def rows(start: int, stop: int) -> Tensor:
        own = torch.arange(start, stop)
        is_new = (own >= there) & (own < here)
        return torch.where(is_new, -1, torch.where(own < here, own, own + (there - here)))

    def weights(start: int, stop: int) -> Tensor:
        found = torch.zeros(stop - start, dtype=torch.float64)
        first, end = (min(row * divisor, ids.earlier) for row in (start, stop))
        for low in range(first, end, _COUNTS_AT_ONCE):
            high = min(low + _COUNTS_AT_ONCE, end)
            quotients = torch.arange(low, high) // divisor - start
            found.index_add_(0, quotients, ids.counts.read(low, high))
        return found

    size, before = (here + divisor,), (there + divisor,)
    return RowMove(
        rows=ComputedRows(size, torch.int64, rows),
        fresh=ComputedRows(size, torch.bool, lambda a, b: rows(a, b) < 0),
        weights=ComputedRows(before, torch.float64, weights),
    )


class TwoKeysRoute(nn.Module):
    """Two look-ups per feature: the quotient's row, then the remainder's."""

    def __init__(
        self, keys: Sequence[str], check: RangeCheck, divisor: int, quotients: Sequence[int]
    ) -> None:
        super().__init__()
        self.check = check
        self.copies = RepeatFeatures(keys, [source // 2 for source in range(len(keys))])
        self._keys = list(keys)
        self._divisor = divisor
        self._quotients = Constant(quotients)
        count = len(quotients)
        self._constants = Constant.stacked(  # a row is `first + id // divisor % rows`
            Constant([1 << 62, divisor] * count),
            Constant([divisor, 1] * count),
            Constant([each for first in quotients for each in (0, first)]),
        )
        steps = _quotient_and_remainder(divisor, quotients)
        self._routes = {key: [step] for key, step in zip(keys, chain.from_iterable(steps))}

    def fused_routes(self) -> FusedRoutes:
        """The quotient's row under one key, the remainder's under the next."""
        return FusedRoutes(by_key=self._routes, limits=self.check.limits)

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        features = self.check(features)
        copies = self.copies(features)
        count = common_count(copies)
        if count is not None:
            quotients = self._quotients.on(copies.device())
            parts = copies.values().to(torch.int64).view(len(self._keys) // 2, 2, count)
            rows = torch.empty_like(parts)
            rows[:, 0] = parts[:, 0].div(self._divisor, rounding_mode="floor")
            rows[:, 1] = parts[:, 1].remainder(self._divisor)
            rows[:, 1] += quotients.unsqueeze(1)
            return renamed(copies, self._keys, rows.view(-1))
        ids, (rows, divisors, firsts) = beside_ids(copies, self._constants)
        found = ids.div(divisors, rounding_mode="floor").remainder_(rows).add_(firsts)
        return renamed(copies, self._keys, found.view(-1))


class BagOfTwoRoute(nn.Module):
    """One look-up per feature whose bags hold both rows of every id: the bag adds them."""

    def __init__(
        self, keys: Sequence[str], check: RangeCheck, divisor: int, quotients: Sequence[int]
    ) -> None:
        super().__init__()
        self.check = check
        self._keys = list(keys)
        self._divisor = divisor
        self._quotients = Constant(quotients)
        self._routes = dict(zip(keys, _quotient_and_remainder(divisor, quotients)))

    def fused_routes(self) -> FusedRoutes:
        """Both rows under one key."""
        return FusedRoutes(by_key=self._routes, limits=self.check.limits)

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        features = self.check(features)
        ids = features.values().to(torch.int64)
        quotients = self._quotients.on(ids.device)
        count = common_count(features)
        rows = ids.new_empty(ids.numel(), 2)
        rows[:, 0] = ids.div(self._divisor, rounding_mode="floor")
        rows[:, 1] = ids.remainder(self._divisor)
        if count is None:
            rows[:, 1] += per_value(quotients, features)
        else:
            rows.view(len(self._keys), count, 2)[:, :, 1] += quotients.unsqueeze(1)
        weights = features.weights_or_none()
        return KeyedJaggedTensor(
            keys=self._keys,
            values=rows.view(-1),
            weights=None if weights is None else weights.repeat_interleave(2),
            lengths=features.lengths() * 2,
            stride=features.stride(),
            length_per_key=[2 * length for length in features.length_per_key()],
        )


def _quotient_and_remainder(divisor: int, quotients: Sequence[int]) -> list[list[IdRoute]]:
    """For each feature, the row of an id's quotient and that of its remainder behind those."""
    return [
        [QuotientRow(divisor=divisor), RemainderRow(divisor=divisor, first=first)]
        for first in quotients
    ]


class Product(nn.Module):
    """Multiplies each feature's two rows.

    Args:
        widths: for each (table, feature), the width of a part and of the embedding.
    """

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self._splits = [width for width, _ in widths for _ in range(2)]

    def fused_embeddings(self, widths: Sequence[int]) -> list[FusedEmbedding]:
        """One row times the other."""
        return [
            FusedEmbedding(
                rows=[PlacedRow(key=key), PlacedRow(key=key + 1, how="multiply")], width=width
            )
            for key, width in enumerate(widths)
            if key % 2 == 0
        ]

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (B, 2 * sum of widths) -> (B, sum of widths)
        if len(set(self._splits)) == 1:
            return PairProduct.apply(rows.view(rows.shape[0], -1, 2, self._splits[0])).flatten(1)
        parts = rows.split(self._splits, dim=1)
        return torch.cat([q * r for q, r in zip(parts[::2], parts[1::2])], dim=1)

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        return [PairProduct.apply(part.unflatten(1, (1, 2, -1))).flatten(1) for part in parts]


class PairProduct(torch.autograd.Function):
    """`pairs[:, :, 0] * pairs[:, :, 1]`, whose gradient takes the place of the pairs.

    Nothing else reads the looked-up rows, and a tensor of their size costs as much as the product.
    A second backward through the same graph is an error of autograd's, not a wrong gradient: the
    saved rows have been written to.
    """

    @staticmethod
    @override
    def forward(ctx: FunctionCtx, pairs: Tensor) -> Tensor:  # (B, F, 2, D) -> (B, F, D)
        ctx.save_for_backward(pairs)
        return pairs[:, :, 0] * pairs[:, :, 1]

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # (B, F, D) -> (B, F, 2, D)
        (pairs,) = ctx.saved_tensors
        for rows, rows_grad in zip(pairs.split(CHUNK), grad.split(CHUNK)):
            first, second = rows.unbind(dim=2)
            first_grad = rows_grad * second
            torch.mul(rows_grad, first, out=second)
            first.copy_(first_grad)
        return pairs.detach()


class ConcatenatedHalves(nn.Module):
    """Puts the halves side by side; of an odd width, the last remainder column is cut off."""

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self._dims = [dim for _, dim in widths]
        kept: list[int] = []
        start = 0
        for half, dim in widths:
            kept += range(start, start + dim)
            start += 2 * half
        self._columns = None if len(kept) == start else Constant(kept)
        self._widths = list(widths)

    def fused_embeddings(self, widths: Sequence[int]) -> list[FusedEmbedding]:
        """Two rows side by side, cut."""
        both = side_by_side(widths, [2 * half for half, _ in self._widths])
        return [fitted(each, widths, dim) for each, (_, dim) in zip(both, self._widths)]

    @override
    def forward(self, rows: Tensor) -> Tensor:
        if self._columns is None:
            return rows
        return rows.index_select(1, self._columns.on(rows.device))

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        return [part[:, :dim] for part, dim in zip(parts, self._dims)]
