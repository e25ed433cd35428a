"""Columns by frequency block: frequent ids keep more of the embedding's columns than rare ones.

The serving form of DNIS (`embcomp.backends.dnis`, which cites the papers). The reference stores a
pruned table as a sparse matrix, element by element; here the ids of a block share their columns, so
that a block is a dense table as narrow as the columns it kept.

Each block is a physical table and a look-up key of its own. An id has a row under one of its
feature's keys and is skipped under the others, so that there is one look-up per id however many
blocks there are, and bags are pooled before anything else happens: which columns a row fills depends
on its key alone. The alternative of pieces 4 columns wide, shared by all blocks, would take several
look-ups per id, could not be pooled first and would not be byte-exact; it was also slower (16 ms
against 13 ms for a step of 2,048 rows and 26 tables on one CPU core).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig, FollowedForm, FollowInputs
from embcomp.backends.full import RangeCheck
from embcomp.errors import ConfigError
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.derived_tensors import Derived
from embcomp.layers.followed_ids import FollowedIds, RowMove
from embcomp.layers.frequency_blocks import block_ranges, check_cuts
from embcomp.layers.fused_lookups import FusedEmbedding, FusedRoutes, PlacedRow, RowWithin
from embcomp.layers.id_counts import check_ranked
from embcomp.layers.learned_buffers import LearnedBuffers
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.routing import RepeatFeatures, beside_ids, renamed
from embcomp.layers.row_sources import ComputedRows
from embcomp.tables.footprint import Footprint, TensorFootprint
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit

UNRANKED = (
    "Blocks are ranges of ids, and a list of which id comes where would take more bytes than they "
    "save; number ids by falling frequency, as embcomp prepare does"
)
"""What to do about ids that are in another order."""


@dataclass(frozen=True, kw_only=True)
class IdBlock:
    """A range of a table's ids that is stored in one dense table.

    Args:
        index: number of the block in its table.
        low: its first id.
        high: the id after its last.
        width: columns that are stored.
    """

    index: int
    low: int
    high: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Blocks(BackendConfig):
    """Dense blocks of rows, each as wide as the columns that its ids keep.

    Which columns they are is learnt; a fresh block keeps its first ones.

    Args:
        widths: for each table by name, how many columns each of its blocks keeps, in the order of
            ids. A block of 0 stores nothing and gives zeros; more than `embedding_dim` means
            whole rows.
        cuts: for each table by name, the first ids of all its blocks but the first. A table that
            is not named is one block.
    """

    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    cuts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    name: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        super().__post_init__()
        for table, widths in self.widths.items():
            cuts = self.cuts.get(table, ())
            check_cuts(self.name, table, cuts, None)
            if len(widths) != len(cuts) + 1 or min(widths) < 0:
                raise ConfigError(
                    f"blocks: table {table!r} has {len(cuts) + 1} block(s), so widths must be as "
                    f"many numbers of columns, at least 0; got {list(widths)}"
                )

    @property
    def needs_ranked_ids(self) -> bool:
        """Whether ids must be ranked by frequency, as blocks are ranges of them."""
        return bool(self.cuts)

    @override
    def check_ids(self, tables: Sequence[TableSpec], counts: Mapping[str, Tensor]) -> None:
        for table in tables:
            check_ranked(self.name, table, counts, self.cuts.get(table.name, ()), UNRANKED)

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return False

    def blocks(self, table: TableSpec) -> list[IdBlock]:
        """The blocks of a table that store anything, in the order of ids."""
        if table.name not in self.widths:
            raise ConfigError(
                f"blocks: widths say nothing of table {table.name!r}; "
                f"they name {', '.join(self.widths) or 'no table'}"
            )
        cuts = self.cuts.get(table.name, ())
        check_cuts(self.name, table.name, cuts, table.num_embeddings)
        ranges = block_ranges(cuts, table.num_embeddings)
        return [
            IdBlock(index=index, low=low, high=high, width=min(width, table.embedding_dim))
            for index, ((low, high), width) in enumerate(zip(ranges, self.widths[table.name]))
            if width
        ]

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [
            PhysicalTable(
                name=block_table(table.name, block.index),
                num_embeddings=block.high - block.low,
                embedding_dim=block.width,
                lookups=tuple(
                    LookupKey(table.name, feature, block.index) for feature in table.feature_names
                ),
                init_fn=table.init_fn or UniformInit(*table.init_bounds),
                data_type=table.data_type,
            )
            for table in tables
            for block in self.blocks(table)
        ]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        if not physical:
            raise ConfigError(
                f"blocks: of {len(tables)} table(s) ({tables[0].name}, ...) no block keeps a "
                "column; widths must leave at least one"
            )
        lookups = list(self._lookups(tables))
        keys = [str(LookupKey(table.name, feature, b.index)) for _, table, feature, b in lookups]
        route = BlockRoute(
            keys,
            RangeCheck(tables),
            sources=[source for source, _, _, _ in lookups],
            ranges=[(block.low, block.high) for _, _, _, block in lookups],
        )
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=route,
            combine=self._spread(tables),
            skips_negative_ids=True,
        )

    def _lookups(
        self, tables: Sequence[TableSpec]
    ) -> Iterator[tuple[int, TableSpec, str, IdBlock]]:
        """Position of the (table, feature), both of them, and the block, in the order of keys."""
        source = 0
        for table in tables:
            blocks = self.blocks(table)
            for feature in table.feature_names:
                yield from ((source, table, feature, block) for block in blocks)
                source += 1

    def _spread(self, tables: Sequence[TableSpec]) -> SpreadColumns:
        widths, pairs, starts = [], [], []
        sizes: list[tuple[str, int]] = []
        place = start = 0
        for table in tables:
            own = [block.width for block in self.blocks(table)]
            sizes.append((table.name, sum(own)))
            for _ in table.feature_names:
                pairs.append((place, sum(own)))
                starts.append(start)
                start += table.embedding_dim
            widths += own
            place += sum(own)
        return SpreadColumns(
            widths, pairs, starts, tables=sizes, total=start, dtype=column_dtype(tables)
        )

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        return Footprint(
            tuple(
                TensorFootprint(
                    name=f"{table.name}.columns",
                    role="remap",
                    rows=1,
                    columns=kept,
                    itemsize=column_dtype(tables).itemsize,
                    train_columns=kept,
                    lookup=False,
                )
                for table in tables
                if (kept := sum(block.width for block in self.blocks(table)))
            )
        )

    @property
    @override
    def needs_same_numbers(self) -> bool:
        return True

    @override
    def follow_ids(self, past: FollowInputs) -> FollowedForm:
        moves = {}
        for table, before in zip(past.tables, past.tables_before):
            for block, then in zip(self.blocks(table), self.blocks(before)):
                moves[block_table(table.name, block.index)] = _followed(
                    past.ids[table.name], (block.low, block.high), (then.low, then.high)
                )
        return FollowedForm(config=self, moves=moves)

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        return self if self.footprint(tables).serve_bytes <= budget else None

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self


def _followed(ids: FollowedIds, own: tuple[int, int], then: tuple[int, int]) -> RowMove:
    """Where the rows of a block come from.

    Args:
        ids: where ids come from, all at their old numbers.
        own: the ids of the block.
        then: those that it had.
    """
    before, rows_then = ids.before.range(*own), then[1] - then[0]

    def rows(start: int, stop: int) -> Tensor:
        found = before.read(start, stop) - then[0]
        # What stands for new values may lie in another block, whose columns are others.
        return torch.where((found < 0) | (found >= rows_then), -1, found)

    return RowMove(
        rows=ComputedRows((len(before),), torch.int64, rows, of=[before]),
        fresh=ids.fresh.range(*own),
        weights=ids.counts.range(*then),
    )


def block_table(table: str, index: int) -> str:
    """Name of the physical table of a table's block."""
    return f"{table}__block_{index}"


def column_dtype(tables: Sequence[TableSpec]) -> torch.dtype:
    """The smallest type that holds the columns of all these tables."""
    widest = max(table.embedding_dim for table in tables)
    return torch.uint8 if widest <= 256 else torch.int32


class BlockRoute(nn.Module):
    """Sends an id to its row in the block that holds it; other blocks' keys skip it.

    Args:
        keys: names of the look-ups, one for each block of each (table, feature).
        check: refuses ids that no block holds.
        sources: for each look-up, the position of its feature among the incoming keys.
        ranges: for each look-up, the ids of its block.
    """

    def __init__(
        self,
        keys: Sequence[str],
        check: RangeCheck,
        sources: Sequence[int],
        ranges: Sequence[tuple[int, int]],
    ) -> None:
        super().__init__()
        self.check = check
        self._keys = list(keys)
        self.copies = RepeatFeatures(keys, sources)
        self._constants = Constant.stacked(
            Constant([low for low, _ in ranges]), Constant([high - low for low, high in ranges])
        )
        self._ranges = list(ranges)

    def fused_routes(self) -> FusedRoutes:
        """A row of the block that holds an id, none of the others."""
        by_key = {
            key: [RowWithin(low=low, high=high)]
            for key, (low, high) in zip(self._keys, self._ranges)
        }
        return FusedRoutes(by_key=by_key, limits=self.check.limits)

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        features = self.check(features)
        copies = self.copies(features)
        ids, (lows, sizes) = beside_ids(copies, self._constants)
        rows = ids - lows
        rows.masked_fill_(rows >= sizes, -1)  # ids before the block are negative already
        return renamed(copies, self._keys, rows.view(-1))


class SpreadColumns(LearnedBuffers):
    """Puts the columns that blocks keep where they belong in the embedding, zeros elsewhere.

    Attributes:
        columns: (sum of widths,) for every block of every table, the embedding's columns that it
            keeps.

    Args:
        widths: columns of each block, table after table.
        pairs: for each (table, feature), where its table's columns begin, and how many they are.
        starts: for each (table, feature), where its embedding begins in the output.
        tables: name of each table, and the columns that all its blocks keep.
        total: columns of the output.
        dtype: of `columns`.
    """

    columns: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        pairs: Sequence[tuple[int, int]],
        starts: Sequence[int],
        *,
        tables: Sequence[tuple[str, int]],
        total: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._first = [column for width in widths for column in range(width)]
        self._picked = Constant([n for first, count in pairs for n in range(first, first + count)])
        self._offsets = Constant([s for s, (_, count) in zip(starts, pairs) for _ in range(count)])
        self._total = total
        self._places = Derived()
        self._pairs = list(pairs)
        self._dims = [end - start for start, end in zip(starts, [*starts[1:], total])]
        self.store_in_parts("columns", tables)
        self.register_buffer("columns", torch.zeros(len(self._first), dtype=dtype))

    @override
    def reset_buffers(self) -> None:
        self.columns.copy_(torch.tensor(self._first))

    def fused_embeddings(self, widths: Sequence[int]) -> list[FusedEmbedding]:
        """The row of one block, its columns where they belong."""
        self.ensure_filled()
        found, key = [], 0
        for (place, count), dim in zip(self._pairs, self._dims):
            rows = []
            last = place + count
            while place < last:
                own = self.columns[place : place + widths[key]].to(torch.int32)
                rows.append(PlacedRow(key=key, columns=own))
                place += widths[key]
                key += 1
            found.append(FusedEmbedding(rows=rows, width=dim))
        return found

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (B, sum of widths) -> (B, sum of dims)
        self.ensure_filled()
        places = self._places.of([self.columns], self._output_columns)
        return rows.new_zeros(rows.shape[0], self._total).index_add(1, places, rows)

    def _output_columns(self) -> Tensor:
        """(sum of widths that come,) int64 where each column belongs."""
        device = self.columns.device
        picked = self.columns.index_select(0, self._picked.on(device))
        return picked.long() + self._offsets.on(device)

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        self.ensure_filled()
        return [
            part.new_zeros(len(part), dim).index_add(
                1, self.columns[first : first + count].long(), part
            )
            for part, dim, (first, count) in zip(parts, self._dims, self._pairs)
        ]
