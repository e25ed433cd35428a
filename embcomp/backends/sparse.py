"""Rows of which single elements are stored: compressed sparse rows that train and shard.

The serving form of DNIS and AutoSrh (``embcomp.backends.dnis``, which cites the papers) as their
authors prune: any element of any row. Column numbers take one byte where the reference takes four.

The elements of a table are the rows, one column wide, of its physical table. Each column of each
feature is a look-up key of its own, and skips the ids that store nothing there. So bags are pooled
by TorchRec, and gradients reach the stored elements and nothing else. One look-up per element
makes it slower than ``embcomp.backends.blocks``, and training pads an element to four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self

from embcomp.backend import Backend, BackendConfig
from embcomp.backends.blocks import column_dtype
from embcomp.backends.full import RangeCheck
from embcomp.constants import Constant
from embcomp.errors import ConfigError
from embcomp.footprint import Footprint, TensorFootprint
from embcomp.learned import LearnedBuffers
from embcomp.tables import PhysicalTable, TableSpec, UniformInit, look_up_key


@dataclass(frozen=True, kw_only=True)
class Sparse(BackendConfig):
    """Compressed sparse rows: values, their columns, and where each row begins.

    Which elements they are is learnt; fresh ones are the first of each row, evenly many.

    Args:
        nonzeros: for each table by name, how many elements are stored; more than there are means
            all. A table of 0 gives zeros and stores nothing.
    """

    nonzeros: Mapping[str, int] = field(default_factory=dict)

    name: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        for table, count in self.nonzeros.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ConfigError(
                    f"sparse: nonzeros of table {table!r} must be a number of elements, at least "
                    f"0, got {count!r}"
                )

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
        stored = [table for table in tables if self.elements(table)]
        if not stored:
            raise ConfigError(
                f"sparse: none of {len(tables)} table(s) ({tables[0].name}, ...) stores an "
                "element; nonzeros must leave at least one"
            )
        return stored

    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [
            PhysicalTable(
                name=table.name,
                num_embeddings=self.elements(table),
                embedding_dim=1,
                keys=tuple(
                    look_up_key(table.name, feature, column)
                    for feature in table.feature_names
                    for column in range(table.embedding_dim)
                ),
                init_fn=table.init_fn or UniformInit(*table.init_bounds),
                data_type=table.data_type,
            )
            for table in self._stored(tables)
        ]

    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        stored = {table.name for table in physical}
        pairs = [table for table in tables for _ in table.feature_names]
        route = SparseRoute(
            keys,
            RangeCheck(tables),
            [
                (table.num_embeddings, table.embedding_dim, self.elements(table))
                for table in tables
                if table.name in stored
            ],
            sources=[n for n, table in enumerate(pairs) if table.name in stored],
            owners=[
                n
                for n, table in enumerate(t for t in tables if t.name in stored)
                for _ in table.feature_names
            ],
            dtype=column_dtype(tables),
        )
        widths = [(table.embedding_dim, table.name in stored) for table in pairs]
        whole = len(stored) == len(tables)
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=route,
            combine=nn.Identity() if whole else ZeroColumns(widths),
            skips=True,
        )

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
                    look_up=False,
                )
                for table in stored
                for part, length, size in (
                    ("pointers", table.num_embeddings + 1, itemsize),
                    ("columns", self.elements(table), column_dtype(tables).itemsize),
                )
            )
        )

    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        return self if self.footprint(tables).serve_bytes <= budget else None

    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self


def pointer_dtype(elements: Sequence[int]) -> torch.dtype:
    """The type of row pointers into tables of so many elements."""
    return torch.int32 if max(elements) < 2**31 else torch.int64


class SparseRoute(LearnedBuffers):
    """Finds the elements of each id's row, column by column.

    Attributes:
        pointers: (sum of rows + 1,) int32 or int64, for each table where its rows' elements
            begin, and where the last one ends.
        columns: (sum of elements,) the elements' columns.

    Args:
        keys: names of the look-ups, one for each column of each (table, feature).
        check: refuses ids that no table holds.
        tables: for each table that stores anything, its rows, width and elements.
        sources: for each (table, feature) of these, its position among the incoming keys.
        owners: for each of them, its table.
        dtype: of ``columns``.
    """

    pointers: Tensor
    columns: Tensor

    def __init__(
        self,
        keys: Sequence[str],
        check: RangeCheck,
        tables: Sequence[tuple[int, int, int]],
        *,
        sources: Sequence[int],
        owners: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.check = check
        self._keys = list(keys)
        self._tables = list(tables)
        self._sources = list(sources)
        self._widths = [tables[owner][1] for owner in owners]
        self._source_of_key = Constant(
            [n for n, width in enumerate(self._widths) for _ in range(width)]
        )
        rows = [rows + 1 for rows, _, _ in tables]
        elements = [count for _, _, count in tables]
        self._starts = [(sum(rows[:owner]), sum(elements[:owner])) for owner in owners]
        self.register_buffer("pointers", torch.zeros(sum(rows), dtype=pointer_dtype(elements)))
        self.register_buffer("columns", torch.zeros(sum(elements), dtype=dtype))

    def reset_buffers(self) -> None:
        pointers, columns = [], []
        for rows, _, count in self._tables:
            ends = torch.arange(rows + 1) * count // rows
            pointers.append(ends)
            owner = torch.arange(rows).repeat_interleave(ends.diff())
            columns.append(torch.arange(count) - ends[owner])
        self.pointers.copy_(torch.cat(pointers))
        self.columns.copy_(torch.cat(columns))

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        self.check(features)
        self.ensure_filled()
        offsets, weights = features.offset_per_key(), features.weights_or_none()
        rows, repeated, counts = [], [], []
        for source, width, (row, element) in zip(self._sources, self._widths, self._starts):
            own = slice(offsets[source], offsets[source + 1])
            ids = features.values()[own].to(torch.int64)
            rows.append(self._elements(ids + row, width, element).t().reshape(-1))
            counts += [len(ids)] * width
            if weights is not None:
                repeated.append(weights[own].repeat(width))
        picked = torch.tensor(self._sources, device=features.device())
        picked = picked[self._source_of_key.on(features.device())]
        lengths = features.lengths().view(len(features.keys()), -1)
        return KeyedJaggedTensor(
            keys=self._keys,
            values=torch.cat(rows),
            weights=torch.cat(repeated) if repeated else None,
            lengths=lengths.index_select(0, picked).view(-1),
            stride=features.stride(),
            length_per_key=counts,
        )

    def _elements(self, places: Tensor, width: int, first: int) -> Tensor:
        """(ids, width) the elements of some ids' rows, -1 where a row has none.

        Args:
            places: (ids,) where the ids are in ``pointers``.
            width: the table's.
            first: where its elements begin in ``columns``.
        """
        begins, ends = self.pointers[places].long(), self.pointers[places + 1].long()
        counts = ends - begins
        owner = torch.arange(len(places), device=places.device).repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        within = torch.arange(len(owner), device=places.device) - before[owner]
        elements = begins[owner] + within
        found = torch.full((len(places), width), -1, dtype=torch.int64, device=places.device)
        found[owner, self.columns[first + elements].long()] = elements
        return found


class ZeroColumns(nn.Module):
    """Puts zeros where tables store nothing.

    Args:
        widths: for each (table, feature) its width, and whether its columns come.
    """

    def __init__(self, widths: Sequence[tuple[int, bool]]) -> None:
        super().__init__()
        self._widths = list(widths)

    def forward(self, rows: Tensor) -> Tensor:  # (B, widths that come) -> (B, all widths)
        came = iter(rows.split([width for width, comes in self._widths if comes], dim=1))
        parts = [
            next(came) if comes else rows.new_zeros(len(rows), width)
            for width, comes in self._widths
        ]
        return torch.cat(parts, dim=1)
