"""ROBE: all tables in one array of weights, of which an embedding is a few blocks by hash.

Desai, Chou, Shrivastava, "Random Offset Block Embedding Array (ROBE) for CriteoTB Benchmark MLPerf DLRM
Model", MLSys 2022, https://arxiv.org/abs/2108.02191. An embedding is cut into blocks of `Z` weights, and a
block is `Z` weights in a row of the array, from a hashed place on, those behind the last at the front again.
Blocks may overlap in part, so that there are as many places as weights, and two ids share all only where
the hashes of all their blocks do. With `signs` each block is multiplied by a hashed sign.

Where we depart from the paper and public code: blocks begin at multiples of `step` weights (4), as the fused
kernels pad narrower rows anyway, so that the array is a physical table of rows of `step` weights, sharded,
fused and placed like any other; a sign is drawn for each id and row of the array rather than for each
weight; hashes are salted by the table's name (the paper's polynomial modulo a prime near 2**31 ends where ids
pass it), where public code counts tables or offsets their ids; and the array begins with one range of
weights, that of `unified`, whatever the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self, override

from embcomp.backends.base import Backend
from embcomp.backends.hashed_rows import HashedRows
from embcomp.backends.unified import FitWidths
from embcomp.errors import ConfigError
from embcomp.io.constraints import Ge, Le, Positive
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.routing import RepeatFeatures, beside_ids, renamed
from embcomp.tables.budget import largest_int
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit, shared_name

_SIGNS = 1 << 32  # salts of signs are those of look-ups beyond any that there can be


@dataclass(frozen=True, kw_only=True)
class Robe(HashedRows):
    """Blocks of one array of weights. Any id has an embedding.

    Args:
        num_weights: of the array, rounded down to a multiple of `step`, at least one `step`.
        block_size: weights of a block (`Z`), a multiple of `step`.
        step: blocks begin at multiples of so many weights.
        signs: whether blocks are multiplied by hashed signs.
        collisionless: tables of at most this many rows stay full.
        init_range: weights start uniform in `[-init_range, init_range]`.
        seed: salts the hashes.
    """

    num_weights: Annotated[int | None, Ge(1)] = None
    block_size: Annotated[int, Ge(1), Le(2**16)] = 8
    step: Annotated[int, Ge(1), Le(2**16)] = 4
    signs: bool = False
    collisionless: Annotated[int, Ge(0)] = 0
    init_range: Annotated[float, Positive(), Le(10**6)] = 0.05
    seed: int = 2021

    name: ClassVar[str] = "robe"
    size_fields: ClassVar[tuple[str, ...]] = ("num_weights",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size % self.step:
            raise ConfigError(
                f"robe: block_size must be a multiple of step, got {self.block_size} and {self.step}"
            )

    @property
    def rows(self) -> int:
        """Rows of the array, of `step` weights each."""
        return max(1, (self.num_weights or 1) // self.step)

    def lookups(self, table: TableSpec) -> int:
        """Rows of the array that an embedding is made of."""
        return -(-table.embedding_dim // self.step)

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return table.num_embeddings <= self.collisionless

    @override
    def stores_together(self, tables: Sequence[TableSpec]) -> bool:
        return sum(not self.keeps_full(table) for table in tables) > 1

    def _keys(self, tables: Sequence[TableSpec]) -> list[LookupKey]:
        """The look-ups of each feature, row after row; with signs each for plus and for minus."""
        return [
            LookupKey(table.name, feature, part)
            for table in tables
            for feature in table.feature_names
            for part in range(self.lookups(table) * (1 + self.signs))
        ]

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        types = {table.data_type for table in tables}
        if len(types) > 1:
            raise ConfigError(
                f"robe: tables that share weights must have one data_type, got {sorted(map(str, types))}"
            )
        settings = (self.num_weights, self.block_size, self.step, self.signs, self.seed)
        return [
            PhysicalTable(
                name=f"{shared_name(*settings)}__robe",
                num_embeddings=self.rows,
                embedding_dim=self.step,
                lookups=tuple(self._keys(tables)),
                init_fn=UniformInit(-self.init_range, self.init_range),
                data_type=tables[0].data_type,
            )
        ]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        owners = [table for table in tables for _ in table.feature_names]
        lookups = [(n, t.name, row) for n, t in enumerate(owners) for row in range(self.lookups(t))]
        keys = [str(key) for key in self._keys(tables)]
        per_block = self.block_size // self.step
        route = BlocksRoute(
            keys,
            sources=[source for source, _, _ in lookups],
            salts=[table_salt(self.seed, name, row // per_block) for _, name, row in lookups],
            offsets=[row % per_block for _, _, row in lookups],
            sign_salts=[table_salt(self.seed, name, _SIGNS + row) for _, name, row in lookups]
            if self.signs
            else None,
            num_rows=self.rows,
        )
        return Backend(
            physical_tables=self.physical_tables(tables),
            keys=keys,
            route=route,
            combine=self._combine(owners),
            skips_negative_ids=self.signs,
        )

    def _combine(self, owners: Sequence[TableSpec]) -> nn.Module:
        """What brings the rows of each (table, feature) to its width.

        Args:
            owners: the table of each.
        """
        came = [(t.name, self.lookups(t) * self.step, t.embedding_dim) for t in owners]
        exact = all(width == wanted for _, width, wanted in came)
        fit = nn.Identity() if exact else FitWidths(came, projected=set())
        return SignedRows(self.step, fit) if self.signs else fit

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        def fits(rows: int) -> bool:
            return self._at(rows).footprint(tables).serve_bytes <= budget

        most = max(1, sum(table.num_embeddings * self.lookups(table) for table in tables))
        rows = largest_int(fits, 1, most)
        return None if rows is None else self._at(rows)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self._at(1)

    def _at(self, rows: int) -> Self:
        return self.with_size(num_weights=rows * self.step)


class BlocksRoute(nn.Module):
    """Sends an id to the rows of the blocks that its hashes choose.

    Args:
        keys: names of the look-ups; with signs two for each row, the first for plus.
        sources: for each row of an embedding, the position of its feature among the incoming keys.
        salts: for each, the signed 64-bit salt of its block.
        offsets: for each, its place in the block.
        sign_salts: for each, the salt of its sign; None where there are no signs.
        num_rows: of the array.
    """

    def __init__(
        self,
        keys: Sequence[str],
        sources: Sequence[int],
        salts: Sequence[int],
        offsets: Sequence[int],
        sign_salts: Sequence[int] | None,
        num_rows: int,
    ) -> None:
        super().__init__()
        times = 1 if sign_salts is None else 2
        self._keys = list(keys)
        self.copies = RepeatFeatures(keys, [source for source in sources for _ in range(times)])
        own = (offsets, salts, sign_salts or [0] * len(salts))
        self._constants = Constant.stacked(
            *(Constant([value for value in values for _ in range(times)]) for values in own),
            Constant([num_rows] * len(keys)),
            Constant([2] * len(keys)),
            Constant([0, 1] * len(sources) if sign_salts else [0] * len(sources)),
        )
        self._num_rows = num_rows
        self._has_signs = sign_salts is not None

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        copies = self.copies(features)
        ids, own = beside_ids(copies, self._constants)
        times = 2 if self._has_signs else 1  # the hash of a sign beside that of a block
        hashes = hash_rows(ids, own[1 : 1 + times], own[3 : 3 + times])
        rows = hashes[0].add_(own[0]).remainder_(self._num_rows)
        if self._has_signs:
            rows = torch.where(hashes[1] == own[5], rows, -1)
        return renamed(copies, self._keys, rows.reshape(-1))


class SignedRows(nn.Module):
    """Takes rows under minus from those under plus, and brings what is left to each width.

    Args:
        step: columns of a row.
        fit: makes embeddings of the rows side by side.
    """

    def __init__(self, step: int, fit: nn.Module) -> None:
        super().__init__()
        self._step = step
        self.fit = fit

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (B, 2 * sum of widths in) -> (B, sum of dims)
        return torch.as_tensor(self.fit(self._signed(rows)))

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        signed = [self._signed(part) for part in parts]
        return self.fit.each(signed, looked_up) if isinstance(self.fit, FitWidths) else signed

    def _signed(self, rows: Tensor) -> Tensor:
        pairs = rows.unflatten(1, (rows.shape[1] // (2 * self._step), 2, self._step))
        return (pairs[:, :, 0] - pairs[:, :, 1]).flatten(1)
