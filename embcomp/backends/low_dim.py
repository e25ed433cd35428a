"""Rows narrower than the model sees them, and tables without the rows that pruning dropped.

With one `width` it is the baseline that every method should beat: shrink the dimension. With
`widths` it holds mixed dimensions, and with `kept` rows it is what pruning methods leave behind
to be retrained and served: nothing pruned is stored. Rows are padded by zeros to `embedding_dim`
after pooling, so the model around them does not change (Naumov et al., "Mixed Dimension Embeddings
with Application to Memory-Efficient Recommendation Systems", ISIT 2021,
https://arxiv.org/abs/1909.11810 project instead; zeros keep products of embeddings meaningful).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from embcomp.backends.base import (
    Backend,
    BackendConfig,
    FollowedForm,
    FollowInputs,
    MethodState,
    StageInputs,
)
from embcomp.backends.followed_pruning import FollowedRows, followed_rows
from embcomp.backends.full import FullRoute, RangeCheck, numbers
from embcomp.backends.pruned_directory import (
    directory,
    kept_bits,
    kept_by_block,
    mask_blocks,
    pruned_of,
    rows_of,
)
from embcomp.errors import ConfigError
from embcomp.io.constraints import Count, Le
from embcomp.layers.best_values import BestValues
from embcomp.layers.block_work import IN_MEMORY, RowBlock, Work
from embcomp.layers.fused_lookups import FusedEmbedding, fitted, side_by_side
from embcomp.layers.id_counts import check_ranked
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.pruned_route import PrunedRoute, directory_bytes, directory_footprint
from embcomp.layers.row_sources import ComputedRows, RowSource, as_rows
from embcomp.tables.budget import largest_int
from embcomp.tables.footprint import Footprint
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit, by_name


@dataclass(frozen=True, kw_only=True)
class LowDim(BackendConfig):
    """Narrow rows, padded by zeros, of all ids or of those that are kept.

    Args:
        width: columns of the rows of every table that `widths` does not name. A table that is
            no wider stays full.
        widths: columns by table; at most `embedding_dim` of them are used. Where `width` is
            not given, tables that are not named have `embedding_dim` columns.
        kept: by table, how many ids keep a row of their own. All others share one more row.
            Until a pruning method says which, the first ids are kept: the most frequent ones of
            our datasets.
        multiple_of: a budget gives a `width` that is a multiple of this. Training pads rows to
            multiples of 4 anyway.
    """

    width: Annotated[int | None, Count(1), Le(2**16)] = None
    widths: Annotated[Mapping[str, int], Count(1, of="table"), Le(2**16)] = field(
        default_factory=dict
    )
    kept: Annotated[Mapping[str, int], Count(0, of="table")] = field(default_factory=dict)
    multiple_of: Annotated[int, Count(1), Le(2**16)] = 1

    name: ClassVar[str] = "low_dim"
    approximates: ClassVar[bool] = True
    size_fields: ClassVar[tuple[str, ...]] = ("width",)

    @override
    def require_size(self) -> None:
        if not self.widths and not self.kept:
            super().require_size()

    @property
    def needs_ranked_ids(self) -> bool:
        """Whether the first ids must be the most frequent, which are kept until told otherwise."""
        return bool(self.kept)

    @override
    def check_ids(self, tables: Sequence[TableSpec], counts: Mapping[str, Tensor]) -> None:
        for table in tables:
            if self.is_pruned(table) and self.kept[table.name]:
                way_out = (
                    "It keeps the first until a pruning method says which; number ids by falling "
                    "frequency, as embcomp prepare does, or train optembed"
                )
                check_ranked(self.name, table, counts, (self.kept[table.name],), way_out)

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        named = table.name in self.widths or table.name in self.kept
        return not named and self.columns(table) == table.embedding_dim

    @override
    def joins(self, tables: Sequence[TableSpec]) -> bool:
        return any(self.is_pruned(table) for table in tables)

    def columns(self, table: TableSpec) -> int:
        """The width in which a table's rows are stored."""
        wanted = self.widths.get(table.name, self.width)
        return table.embedding_dim if wanted is None else min(wanted, table.embedding_dim)

    def is_pruned(self, table: TableSpec) -> bool:
        """Whether some of a table's ids have no row of their own."""
        return self.kept.get(table.name, table.num_embeddings) < table.num_embeddings

    def rows(self, table: TableSpec) -> int:
        """Stored rows, the shared one included."""
        return self.kept[table.name] + 1 if self.is_pruned(table) else table.num_embeddings

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        self._refuse_unknown_tables(tables)
        return [
            PhysicalTable(
                name=table.name,
                num_embeddings=self.rows(table),
                embedding_dim=self.columns(table),
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
        pruned = {t.name: t.num_embeddings for t in tables if self.is_pruned(t)}
        check = RangeCheck(tables)
        route: nn.Module = FullRoute(keys, check)
        if pruned:
            route = PrunedRoute(keys, [table.name for table in owners], pruned, self.kept, check)
        widths = [(self.columns(table), table.embedding_dim) for table in owners]
        exact = all(came == wanted for came, wanted in widths)
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=route,
            combine=nn.Identity() if exact else PadColumns(widths),
        )

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        return Footprint(
            tuple(
                part
                for table in tables
                if self.is_pruned(table)
                for part in directory_footprint(table.name, table.num_embeddings)
            )
        )

    @override
    def pruned_ids(
        self, tables: Sequence[TableSpec], form: MethodState
    ) -> Mapping[str, Tensor | RowSource]:
        bits = kept_bits(self._pruned(tables), form)
        return {name: pruned_of(own) for name, own in bits.items()}

    @override
    def rows_by_id(
        self, tables: Sequence[TableSpec], form: MethodState
    ) -> Mapping[str, Tensor | RowSource]:
        bits = kept_bits(self._pruned(tables), form)
        return {
            table.name: rows_of(bits[table.name], self.kept[table.name])
            if table.name in bits
            else numbers(table.num_embeddings)
            for table in tables
        }

    def _pruned(self, tables: Sequence[TableSpec]) -> list[TableSpec]:
        return [table for table in by_name(tables) if self.is_pruned(table)]

    @override
    def follow_ids(self, past: FollowInputs) -> FollowedForm:
        bits = kept_bits(self._pruned(past.tables_before), past.before)
        found: dict[str, FollowedRows] = {}
        for table in past.tables:
            kept = self.kept[table.name] if self.is_pruned(table) else None
            found[table.name] = followed_rows(table, past, bits.get(table.name), kept)
        dropped = self._pruned(past.tables)
        tensors: Mapping[str, Tensor | RowSource] = {}
        if dropped:
            masks = {table.name: found[table.name].kept for table in dropped}
            counts = {table.name: found[table.name].counts for table in dropped}
            tensors = directory(dropped, masks, counts, past.work)
        moves = {name: own.move for name, own in found.items()}
        return FollowedForm(config=self, moves=moves, tensors=tensors)

    @override
    def approximate(self, tables: Sequence[TableSpec], past: StageInputs) -> MethodState:
        """The leading columns of the rows of the most frequent ids.

        Where counts do not tell ids apart, rows of the largest norms stand for them. Rows are padded by zeros
        behind, so no other columns than the first can be kept; `low_rank` keeps the best ones.
        """
        rows = {table.name: past.before.rows(table.name) for table in tables}
        masks = {
            table.name: self._best_ids(table, rows[table.name], past)
            for table in tables
            if self.is_pruned(table)
        }
        widths = {table.name: self.columns(table) for table in tables}
        return low_dim_form(tables, rows, masks, widths, past.work)

    def _best_ids(self, table: TableSpec, rows: RowSource, past: StageInputs) -> RowSource:
        """(num_embeddings,) bool which ids keep a row of their own."""
        counts, width = past.counts.get(table.name), self.columns(table)
        if counts is not None and bool((counts == counts[0]).all()):
            counts = None

        def importance(start: int, stop: int) -> Tensor:
            if counts is not None:
                return counts[start:stop].to(torch.float64)
            return rows.read(start, stop)[:, :width].to(torch.float64).norm(dim=1)

        of = [] if counts is not None else [rows]
        values = ComputedRows((table.num_embeddings,), torch.float64, importance, of=of)
        best = BestValues(past.work, f"best-{table.name}", {table.name: values})
        cut = best.cut(lambda counts: sum(counts.values()) <= self.kept[table.name])
        assert cut is not None, "no rows at all fit any number"
        return best.kept(cut)[table.name]

    @override
    def with_widths(self, widths: Mapping[str, int]) -> LowDim:
        return LowDim(widths=widths)

    @override
    def without_pruning(self, tables: Sequence[TableSpec]) -> LowDim:
        return self.with_widths({table.name: self.columns(table) for table in tables})

    def _refuse_unknown_tables(self, tables: Sequence[TableSpec]) -> None:
        known = {table.name for table in tables}
        for key, named in (("widths", self.widths), ("kept", self.kept)):
            unknown = sorted(set(named) - known)
            if unknown:
                raise ConfigError(
                    f"low_dim: {key} names {', '.join(unknown)}, which this method does not hold; "
                    f"it holds {', '.join(table.name for table in tables)}"
                )

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        def fits(step: int) -> bool:
            return self._at(step).footprint(tables).serve_bytes <= budget

        widest = max(table.embedding_dim for table in tables)
        step = largest_int(fits, 1, -(-widest // self.multiple_of))
        return None if step is None else self._at(step)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self._at(1)

    def _at(self, step: int) -> Self:
        return self.with_size(width=step * self.multiple_of)


class PadColumns(nn.Module):
    """Adds columns of zeros behind each embedding.

    Args:
        widths: for each (table, feature), the width that comes and the width that is wanted.
    """

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self._came = [came for came, _ in widths]
        self._missing = [wanted - came for came, wanted in widths]
        self._is_uniform = len(set(widths)) == 1
        self._wanted = [wanted for _, wanted in widths]

    def fused_embeddings(self, widths: Sequence[int]) -> list[FusedEmbedding]:
        """Rows with zeros behind them."""
        narrow = side_by_side(widths, self._came)
        return [fitted(each, widths, dim) for each, dim in zip(narrow, self._wanted)]

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (B, sum of widths in) -> (B, sum of widths out)
        if self._is_uniform:
            parts = rows.view(rows.shape[0], len(self._came), self._came[0])
            return nn.functional.pad(parts, (0, self._missing[0])).flatten(1)
        zeros = rows.new_zeros(rows.shape[0], max(self._missing))
        pieces = []
        for part, missing in zip(rows.split(self._came, dim=1), self._missing):
            pieces.append(part)
            if missing:
                pieces.append(zeros[:, :missing])
        return torch.cat(pieces, dim=1)

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        return [
            nn.functional.pad(part, (0, missing)) if missing else part
            for part, missing in zip(parts, self._missing)
        ]


def pruned_bytes(table: TableSpec, kept: int, width: int) -> int:
    """Serving bytes of a table of which so many ids and columns are kept, in the better form."""
    pruned = (kept + 1) * width * table.itemsize + directory_bytes(table.num_embeddings)
    return min(pruned, table.num_embeddings * width * table.itemsize)


def prunes(table: TableSpec, kept: int, width: int) -> bool:
    """Whether dropping rows saves more than it costs to know which were dropped."""
    return pruned_bytes(table, kept, width) < table.num_embeddings * width * table.itemsize


def low_dim_form(
    tables: Sequence[TableSpec],
    weights: Mapping[str, RowSource | Tensor],
    keep_masks: Mapping[str, RowSource | Tensor],
    widths: Mapping[str, int],
    work: Work = IN_MEMORY,
) -> MethodState:
    """Tables cut down to the rows and columns that a pruning method keeps.

    Pruned ids have embeddings of zeros. A table of which so little is pruned that dropping rows
    does not pay keeps a row of zeros for each of them.

    Args:
        tables: the group.
        weights: for each table, (num_embeddings, at least its width) rows.
        keep_masks: for each table, (num_embeddings,) bool; all ids are kept where there is none.
        widths: columns to keep; `embedding_dim` where there are none.
        work: does it.
    """
    masks = {name: as_rows(mask) for name, mask in keep_masks.items()}
    counts = kept_by_block([table for table in by_name(tables) if table.name in masks], masks, work)
    kept: dict[str, int] = {}
    columns: dict[str, int] = {}
    tensors: dict[str, Tensor | RowSource] = {}
    for table in by_name(tables):
        width = min(widths.get(table.name, table.embedding_dim), table.embedding_dim)
        columns[table.name] = width
        rows, mask = as_rows(weights[table.name]).first_columns(width), masks.get(table.name)
        count = sum(counts.get(table.name, [table.num_embeddings]))
        if mask is not None and count == table.num_embeddings:
            mask = None
        if mask is not None and prunes(table, count, width):
            kept[table.name] = count
        own = _Cut(table=table, rows=rows, mask=mask, drops=table.name in kept)
        tensors[f"rows.{table.name}"] = own.write(work, counts.get(table.name, []))
    dropped = [table for table in by_name(tables) if table.name in kept]
    if dropped:
        tensors |= directory(dropped, masks, counts, work)
    return MethodState.of(LowDim(widths=columns, kept=kept), tensors)


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """What is stored of a table's rows.

    Args:
        table: the table.
        rows: its rows, no wider than they are stored.
        mask: which of them are kept; None keeps all.
        drops: whether the others are dropped; else they become zeros.
    """

    table: TableSpec
    rows: RowSource
    mask: RowSource | None
    drops: bool

    def write(self, work: Work, counts: Sequence[int]) -> RowSource:
        blocks: list[RowBlock] = mask_blocks(self.table)
        sizes = [len(block) for block in blocks]
        if self.drops:  # what is shared stands behind all others
            sizes = [*counts[:-1], counts[-1] + 1]
        return work.write(
            f"rows.{self.table.name}",
            self._part,
            blocks,
            (sum(sizes), self.rows.shape[1]),
            self.rows.dtype,
            sizes=sizes,
        )

    def _part(self, block: RowBlock) -> Tensor:
        rows = self.rows.read(block.start, block.stop)
        if self.mask is None:
            return rows
        mask = self.mask.read(block.start, block.stop)
        if not self.drops:
            return rows * mask.unsqueeze(1).to(rows.dtype)
        kept = rows[mask]
        if block.stop < len(self.rows):
            return kept
        return torch.cat([kept, kept.new_zeros(1, kept.shape[1])])
