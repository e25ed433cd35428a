"""Rows of which single elements are stored: compressed sparse rows that train and shard.

The serving form of DNIS and AutoSrh (`embcomp.backends.dnis`, which cites the papers) as their
authors prune: any element of any row. Column numbers take one byte where the reference takes four.

The elements of a table are the rows, one column wide, of its physical table. Each column of each
feature is a look-up key of its own, and skips the ids that store nothing there. So bags are pooled
by TorchRec, and gradients reach the stored elements and nothing else. One look-up per element
makes it slower than `embcomp.backends.blocks`, and training pads an element to four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig
from embcomp.backends.blocks import column_dtype
from embcomp.backends.full import RangeCheck
from embcomp.errors import ConfigError
from embcomp.io.constraints import Count
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.routing import RepeatFeatures, per_value, renamed
from embcomp.layers.row_exchange import RowPlaces
from embcomp.layers.shardable_buffers import ShardableBuffers
from embcomp.tables.footprint import Footprint, TensorFootprint
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit


@dataclass(frozen=True, kw_only=True)
class Sparse(BackendConfig):
    """Compressed sparse rows: values, their columns, and where each row begins.

    Which elements they are is learnt; fresh ones are the first of each row, evenly many.

    Args:
        nonzeros: for each table by name, how many elements are stored; more than there are means
            all. A table of 0 gives zeros and stores nothing.
    """

    nonzeros: Annotated[Mapping[str, int], Count(0, of="table")] = field(default_factory=dict)

    name: ClassVar[str] = "sparse"

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return False

    def elements(self, table: TableSpec) -> int:
        """Elements that a table stores."""
        if table.name not in self.nonzeros:
            raise ConfigError(
                f"sparse: nonzeros say nothing of table {table.name!r}; "
                f"they name {', '.join(self.nonzeros) or 'no table'}"
            )
        return min(self.nonzeros[table.name], table.num_embeddings * table.embedding_dim)

    def _stored(self, tables: Sequence[TableSpec]) -> list[TableSpec]:
        return [table for table in tables if self.elements(table)]

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [
            PhysicalTable(
                name=table.name,
                num_embeddings=self.elements(table),
                embedding_dim=1,
                lookups=tuple(
                    LookupKey(table.name, feature, column)
                    for feature in table.feature_names
                    for column in range(table.embedding_dim)
                ),
                init_fn=table.init_fn or UniformInit(*table.init_bounds),
                data_type=table.data_type,
            )
            for table in self._stored(tables)
        ]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        if not physical:
            raise ConfigError(
                f"sparse: none of {len(tables)} table(s) ({tables[0].name}, ...) stores an "
                "element; nonzeros must leave at least one"
            )
        keys = [key for table in physical for key in table.keys]
        stored = [table.name for table in physical]
        pairs = [table for table in tables for _ in table.feature_names]
        route = SparseRoute(
            keys,
            RangeCheck(tables),
            [
                SparseTable(
                    name=table.name,
                    rows=table.num_embeddings,
                    columns=table.embedding_dim,
                    elements=self.elements(table),
                )
                for table in self._stored(tables)
            ],
            [stored.index(t.name) if t.name in stored else None for t in pairs],
            dtype=column_dtype(tables),
        )
        widths = [(table.embedding_dim, table.name in stored) for table in pairs]
        whole = len(stored) == len(tables)
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=route,
            combine=nn.Identity() if whole else ZeroColumns(widths),
            skips_negative_ids=True,
        )

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        stored = self._stored(tables)
        itemsize = pointer_dtype([self.elements(table) for table in stored]).itemsize
        return Footprint(
            tuple(
                TensorFootprint(
                    name=f"{table.name}.{part}",
                    role="remap",
                    rows=1,
                    columns=length,
                    itemsize=size,
                    train_columns=length,
                    lookup=False,
                )
                for table in stored
                for part, length, size in (
                    ("pointers", table.num_embeddings + 1, itemsize),
                    ("columns", self.elements(table), column_dtype(tables).itemsize),
                )
            )
        )

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        return self if self.footprint(tables).serve_bytes <= budget else None

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self


def pointer_dtype(elements: Sequence[int]) -> torch.dtype:
    """The type of row pointers into tables of so many elements."""
    return torch.int32 if max(elements, default=0) < 2**31 else torch.int64


@dataclass(frozen=True, kw_only=True)
class SparseTable:
    """A table of elements: its name, its rows, its columns, and how many are stored."""

    name: str
    rows: int
    columns: int
    elements: int


class SparseRoute(ShardableBuffers):
    """Finds the elements of each id's row, column by column.

    Attributes:
        pointers: (sum of rows + 1,) int32 or int64, for each table where its rows' elements
            begin, and where the last one ends.
        columns: (sum of elements,) the elements' columns.

    Args:
        keys: names of the look-ups, one for each column of each (table, feature) that is stored.
        check: refuses ids that no table holds.
        tables: those that store anything.
        owners: for each incoming (table, feature), its place in `tables`; None where its table
            stores nothing.
        dtype: of `columns`.
    """

    pointers: Tensor
    columns: Tensor

    def __init__(
        self,
        keys: Sequence[str],
        check: RangeCheck,
        tables: Sequence[SparseTable],
        owners: Sequence[int | None],
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.check = check
        self._tables = list(tables)
        self._keys = list(keys)
        self._width = max(table.columns for table in tables)
        lookups = [
            (source, column)
            for source, owner in enumerate(owners)
            if owner is not None
            for column in range(tables[owner].columns)
        ]
        self.copies = RepeatFeatures(keys, [source for source, _ in lookups])
        self._columns = Constant([column for _, column in lookups])
        self._owners = [owner or 0 for owner in owners]
        self._stores = Constant([owner is not None for owner in owners])
        elements = [table.elements for table in tables]
        rows = sum(table.rows + 1 for table in tables)
        self.store_by_table("pointers", [(table.name, table.rows + 1) for table in tables])
        self.store_by_table("columns", [(table.name, table.elements) for table in tables])
        self.register_buffer("pointers", torch.zeros(rows, dtype=pointer_dtype(elements)))
        self.register_buffer("columns", torch.zeros(sum(elements), dtype=dtype))
        self.places_changed()

    @override
    def places_changed(self) -> None:
        rows, elements = self.held_parts("pointers"), self.held_parts("columns")
        self._first_rows = Constant([rows[owner].start for owner in self._owners])
        self._first_elements = Constant([elements[owner].start for owner in self._owners])
        if self.exchange is None:
            return
        self._row_places, self._element_places = (
            RowPlaces(
                self.exchange,
                chunks=[parts[n].chunk if parts[n].is_sharded else 0 for n in self._owners],
                starts=[parts[n].start for n in self._owners],
            )
            for parts in (rows, elements)
        )
        self._instances = Constant(range(len(self._owners)))

    @override
    def reset_buffers(self) -> None:
        for table, part in zip(self._tables, self.held_parts("pointers")):
            rows = torch.arange(part.rows.start, part.rows.stop)
            self.pointers[part.place] = (rows * table.elements // table.rows).to(
                self.pointers.dtype
            )
        for table, part in zip(self._tables, self.held_parts("columns")):
            elements = torch.arange(part.rows.start, part.rows.stop)
            owners = ((elements + 1) * table.rows - 1) // table.elements
            columns = elements - owners * table.elements // table.rows
            self.columns[part.place] = columns.to(self.columns.dtype)

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        features = self.check(features)
        self.ensure_filled()
        elements = self._elements(features)
        places = torch.arange(elements.shape[0], device=elements.device)
        copies = self.copies(renamed(features, features.keys(), places))
        columns = per_value(self._columns.on(elements.device), copies)
        return renamed(copies, self._keys, elements[copies.values(), columns])

    def _elements(self, features: KeyedJaggedTensor) -> Tensor:
        """(ids, widest table) each id's elements by column, -1 where there is none."""
        ids = features.values().to(torch.int64)
        begins, counts = self._pointed_to(features, ids)
        nth = torch.arange(self._width, device=ids.device)
        elements = begins + nth  # of which the first `counts` are the row's own
        columns = self._columns_of(features, elements, nth < counts)
        # One more column takes what is not the row's own.
        columns = torch.where(nth < counts, columns, self._width)
        found = ids.new_full((ids.shape[0], self._width + 1), -1)
        return found.scatter(1, columns, elements)[:, : self._width]

    def _pointed_to(self, features: KeyedJaggedTensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where each id's elements begin in its table, and how many they are: (ids, 1) each."""
        if self.exchange is None:
            rows = ids + per_value(self._first_rows.on(ids.device), features)
            rows = rows.clamp(max=self.pointers.shape[0] - 2)  # of tables that store nothing
            begins, ends = self.pointers[rows].long(), self.pointers[rows + 1].long()
        else:
            instances = per_value(self._instances.on(ids.device), features)
            ids = ids * self._stores.on(ids.device)[instances]  # any row, where a table has none
            both = torch.cat([ids, ids + 1])  # a row's end may be with the next rank
            found = self._row_places.ask(instances.repeat(2), both, self._own_pointers)
            begins, ends = found.long().chunk(2)
        return begins.unsqueeze(1), (ends - begins).unsqueeze(1)

    def _own_pointers(self, places: Tensor) -> Tensor:
        return self.pointers[places]

    def _columns_of(self, features: KeyedJaggedTensor, elements: Tensor, own: Tensor) -> Tensor:
        """The columns of elements (ids, n) of the ids' tables, any number where they are not `own`."""
        if self.exchange is None:
            first = per_value(self._first_elements.on(elements.device), features).unsqueeze(1)
            return self.columns[(first + elements).clamp(max=self.columns.shape[0] - 1)].long()
        instances = per_value(self._instances.on(elements.device), features)
        instances = instances.unsqueeze(1).expand_as(elements)[own]
        found = torch.zeros_like(elements)
        found[own] = self._element_places.ask(instances, elements[own], self._own_columns).long()
        return found

    def _own_columns(self, places: Tensor) -> Tensor:
        return self.columns[places]


class ZeroColumns(nn.Module):
    """Puts zeros where tables store nothing.

    Args:
        widths: for each (table, feature) its width, and whether its columns come.
    """

    def __init__(self, widths: Sequence[tuple[int, bool]]) -> None:
        super().__init__()
        self._widths = list(widths)

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (B, widths that come) -> (B, all widths)
        came = iter(rows.split([width for width, comes in self._widths if comes], dim=1))
        parts = [
            next(came) if comes else rows.new_zeros(len(rows), width)
            for width, comes in self._widths
        ]
        return torch.cat(parts, dim=1)

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        return [
            part if comes else part.new_zeros(len(part), width)
            for part, (width, comes) in zip(parts, self._widths)
        ]
