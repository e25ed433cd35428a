"""Unified Embedding: one physical table for all features, several salted look-ups for each.

Coleman, Kang, Fahrbach, Wang, Hong, Chi, Cheng, "Unified Embedding: Battle-Tested Feature
Representations for Web-Scale ML Systems", NeurIPS 2023, https://arxiv.org/abs/2305.12102. Values of
different features that share a row can be told apart by the layer above; values of one feature that
share all their rows cannot, and several narrow look-ups make that rare.

Where we depart from the authors' layer: look-ups are concatenated in numeric order (theirs sorts
names, so the tenth comes before the second); features of one logical table share its rows, as they do
in TorchRec; and salts are drawn from (seed, name of the table, look-up), where theirs count the
features that were added before. So where an id's rows are does not depend on the tables around: they
can be reordered, and one can be added to trained ones of a fixed size, or taken away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self, override

from embcomp.backends.base import Backend
from embcomp.backends.hashed_rows import HashedRows
from embcomp.errors import ConfigError
from embcomp.io.constraints import Ge, Le, Positive
from embcomp.layers.fused_lookups import FusedEmbedding, PlacedRow, fitted, side_by_side
from embcomp.layers.hashing import table_salt
from embcomp.layers.joined_matrices import JoinedColumns, JoinsTables
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.named_parts import part_name
from embcomp.layers.routing import HashRoute
from embcomp.tables.budget import largest_int
from embcomp.tables.footprint import Footprint, TensorFootprint
from embcomp.tables.name_hash import name64
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit, shared_name


@dataclass(frozen=True, kw_only=True)
class Unified(HashedRows):
    """Feature multiplexing over one hashed table, or a few.

    Args:
        num_buckets: rows of each physical table.
        num_chunks: look-ups per feature. Each gives a chunk of the embedding; chunks are
            `ceil(widest embedding / num_chunks)` wide.
        chunks: look-ups of single tables, by name, where they differ from `num_chunks`. Fewer
            leave the embedding's tail at zero; more are projected to its width by a learnt
            matrix.
        num_tables: physical tables; a table's look-ups are dealt to them in turn, from one on that
            its name chooses. For spreading load. One that no look-up falls to is not made.
        collisionless: tables of at most this many rows stay full.
        init_range: rows start uniform in `[-init_range, init_range]`.
        seed: salts the hash.
    """

    num_buckets: Annotated[int | None, Ge(1)] = None
    num_chunks: Annotated[int, Ge(1), Le(1024)] = 2
    chunks: Annotated[Mapping[str, int], Ge(1), Le(1024)] = field(default_factory=dict)
    num_tables: Annotated[int, Ge(1), Le(1024)] = 1
    collisionless: Annotated[int, Ge(0)] = 0
    init_range: Annotated[float, Positive(), Le(10**6)] = 0.05
    seed: int = 2021

    name: ClassVar[str] = "unified"
    size_fields: ClassVar[tuple[str, ...]] = ("num_buckets",)

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return table.num_embeddings <= self.collisionless

    @override
    def stores_together(self, tables: Sequence[TableSpec]) -> bool:
        return sum(not self.keeps_full(table) for table in tables) > 1

    @override
    def joins(self, tables: Sequence[TableSpec]) -> bool:
        return self.num_tables > 1  # look-ups are dealt out to the tables in turn

    def chunk_dim(self, tables: Sequence[TableSpec]) -> int:
        """Width of a look-up: the widest embedding in `num_chunks` parts, rounded up."""
        return -(-max(table.embedding_dim for table in tables) // self.num_chunks)

    def lookups(self, table: TableSpec, chunk_dim: int) -> int:
        """Look-ups of a table: as said in `chunks`, else as many as its embedding needs."""
        return self.chunks.get(table.name, -(-table.embedding_dim // chunk_dim))

    def _lookups(self, tables: Sequence[TableSpec]) -> list[LookupKey]:
        """All look-ups, chunk after chunk within each feature."""
        width = self.chunk_dim(tables)
        return [
            LookupKey(table.name, feature, chunk)
            for table in tables
            for feature in table.feature_names
            for chunk in range(self.lookups(table, width))
        ]

    def _table_names(self) -> list[str]:
        shared = shared_name(self.num_buckets, self.num_chunks, self.num_tables, self.seed)
        return [f"{shared}__unified_{s}" for s in range(self.num_tables)]

    def _dealt(self, tables: Sequence[TableSpec]) -> list[tuple[LookupKey, ...]]:
        """The look-ups made in each physical table; there may be none where few are made at all."""
        width = self.chunk_dim(tables)
        dealt: list[list[LookupKey]] = [[] for _ in range(self.num_tables)]
        for table in tables:
            first = name64(table.name)
            for feature in table.feature_names:
                for chunk in range(self.lookups(table, width)):
                    key = LookupKey(table.name, feature, chunk)
                    dealt[(first + chunk) % self.num_tables].append(key)
        return [tuple(keys) for keys in dealt]

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        self._refuse_unknown_tables(tables)
        lookups = self._lookups(tables)
        if len(lookups) < self.num_tables:
            raise ConfigError(
                f"unified: num_tables must be at most the {len(lookups)} look-ups made in them, "
                f"got {self.num_tables}"
            )
        types = {table.data_type for table in tables}
        if len(types) > 1:
            raise ConfigError(
                f"unified: tables that share rows must have one data_type, got {sorted(map(str, types))}"
            )
        return [
            PhysicalTable(
                name=name,
                num_embeddings=self.num_buckets or 1,
                embedding_dim=self.chunk_dim(tables),
                lookups=own,
                init_fn=UniformInit(-self.init_range, self.init_range),
                data_type=tables[0].data_type,
            )
            for name, own in zip(self._table_names(), self._dealt(tables))
            if own
        ]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        width = self.chunk_dim(tables)
        lookups = [
            (source, table, chunk)
            for source, table in enumerate(t for t in tables for _ in t.feature_names)
            for chunk in range(self.lookups(table, width))
        ]
        keys = [str(key) for key in self._lookups(tables)]
        route = HashRoute(
            keys,
            sources=[source for source, _, _ in lookups],
            salts=[table_salt(self.seed, table.name, chunk) for _, table, chunk in lookups],
            num_rows=[self.num_buckets or 1] * len(keys),
        )
        widths = {table.name: self.lookups(table, width) * width for table in tables}
        exact = all(widths[table.name] == table.embedding_dim for table in tables)
        return Backend(
            physical_tables=self.physical_tables(tables),
            keys=keys,
            route=route,
            combine=nn.Identity() if exact else self._fit(tables, width),
        )

    def _fit(self, tables: Sequence[TableSpec], width: int) -> FitWidths:
        return FitWidths(
            [
                (table.name, self.lookups(table, width) * width, table.embedding_dim)
                for table in tables
                for _ in table.feature_names
            ],
            projected={table.name for table in tables if self._is_projected(table, width)},
        )

    def _is_projected(self, table: TableSpec, width: int) -> bool:
        """Whether a whole chunk or more lies beyond the embedding's width."""
        return self.lookups(table, width) * width - table.embedding_dim >= width

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        width = self.chunk_dim(tables)
        return Footprint(
            tuple(
                TensorFootprint(
                    name=f"{table.name}.projection",
                    role="projection",
                    rows=self.lookups(table, width) * width,
                    columns=table.embedding_dim,
                    itemsize=4,
                    train_columns=table.embedding_dim,
                    lookup=False,
                )
                for table in tables
                if self._is_projected(table, width)
            )
        )

    def _refuse_unknown_tables(self, tables: Sequence[TableSpec]) -> None:
        unknown = sorted(set(self.chunks) - {table.name for table in tables})
        if unknown:
            raise ConfigError(
                f"unified: chunks names {', '.join(unknown)}, which this method does not hold; "
                f"it holds {', '.join(table.name for table in tables)}"
            )

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        def fits(rows: int) -> bool:
            return self.with_size(num_buckets=rows).footprint(tables).serve_bytes <= budget

        most = max(1, sum(table.num_embeddings for table in tables) * self.num_chunks)
        rows = largest_int(fits, 1, most)
        return None if rows is None else self.with_size(num_buckets=rows)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self.with_size(num_buckets=1)


class FitWidths(JoinsTables):
    """Brings concatenated chunks to each embedding's width: cut, padded by zeros, or projected.

    Args:
        widths: for each (table, feature), the table's name, the width that comes and the width
            that is wanted.
        projected: tables whose surplus is projected rather than cut.
    """

    def __init__(self, widths: Sequence[tuple[str, int, int]], projected: set[str]) -> None:
        super().__init__()
        self._widths = list(widths)
        self._projected = set(projected)
        self._joined = JoinedColumns([came for _, came, _ in widths], [own for *_, own in widths])
        self.projections = nn.ModuleDict(
            {
                part_name("table", name): Projection(came, wanted)
                for name, came, wanted in widths
                if name in projected
            }
        )

    def fused_embeddings(self, widths: Sequence[int]) -> list[FusedEmbedding]:
        """Chunks side by side, cut or filled; those of a projection go through its rows."""
        chunks = side_by_side(widths, [came for _, came, _ in self._widths])
        return [
            self._projected_rows(name, each, widths, wanted)
            if name in self._projected
            else fitted(each, widths, wanted)
            for each, (name, _, wanted) in zip(chunks, self._widths)
        ]

    def _projected_rows(
        self, name: str, chunks: FusedEmbedding, widths: Sequence[int], wanted: int
    ) -> FusedEmbedding:
        matrix = self._matrix(name)
        assert matrix is not None
        rows = [
            PlacedRow(
                key=row.key,
                how="add",
                projection=matrix[row.into : row.into + widths[row.key]].contiguous(),
            )
            for row in chunks.rows
        ]
        return FusedEmbedding(rows=rows, width=wanted)

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (B, sum of widths in) -> (B, sum of widths out)
        if self.joins(rows):
            return self._joined(rows, [self._matrix(name) for name, _, _ in self._widths])
        return torch.cat(self._fitted(rows.split([came for _, came, _ in self._widths], dim=1)), 1)

    def _matrix(self, table: str) -> Tensor | None:
        if table not in self._projected:
            return None
        projection = self.projections[part_name("table", table)]
        assert isinstance(projection, Projection)
        return projection.weight.detach()

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        return self._fitted(parts)

    def _fitted(self, parts: Sequence[Tensor]) -> list[Tensor]:
        fitted = []
        for part, (name, came, wanted) in zip(parts, self._widths):
            if name in self._projected:
                fitted.append(self.projections[part_name("table", name)](part))
            elif came < wanted:
                fitted.append(F.pad(part, (0, wanted - came)))
            else:
                fitted.append(part[:, :wanted])
        return fitted


class Projection(nn.Module):
    """A learnt matrix from concatenated chunks to an embedding.

    It is a module of its own because a `meta` build is filled module by module: only the direct
    owner of a parameter is asked to reset it.

    Args:
        came: width of the chunks together.
        wanted: width of the embedding.
    """

    def __init__(self, came: int, wanted: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(came, wanted))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Chunks that would share a column start out summed there at equal variance."""
        with torch.no_grad():
            came, wanted = self.weight.shape
            rows = torch.arange(came, device=self.weight.device)
            self.weight.zero_()
            self.weight[rows, rows % wanted] = (wanted / came) ** 0.5

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (B, came) -> (B, wanted)
        return rows @ self.weight
