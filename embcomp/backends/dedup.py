"""Rows that are alike are stored once: trained tables, and a map from ids to the rows that are left.

After Zhou et al., "Serving Deep Learning Models with Deduplication from Relational Databases", PVLDB 2022,
https://arxiv.org/abs/2201.10442, as the benchmark of Zhang et al., "Experimental Analysis of Large-scale Learnable
Vector Storage Compression", PVLDB 2024, https://arxiv.org/abs/2311.15578, compares it. It pays where many rows have
hardly moved from where they began, as those of rare ids have not, or where ids mean the same.

Where we depart. There blocks of 10,000 rows share where 70 % of their weights differ by at most .01, found by LSH and
tried one by one; here single rows share, each weight of which falls on the same multiple of `tolerance` when
rounded, so that none is further from what stands for it than that: one pass of hashes, the same on every rank and
machine. What stands for rows is their mean, weighted by how often their ids are looked up, rather than one of
them. A budget takes the smallest tolerance that fits, the same for all tables. What is served is `mapped`, whose
map is packed to the bit and billed; it is trained on for a stage, as the paper fine-tunes shared blocks.

`compact` may not change answers, so it lets equal rows share and no others. Shared rows and the map are made in the
memory of every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig, MethodState, StageInputs, full_table
from embcomp.backends.full import Full
from embcomp.backends.mapped.mapped import Mapped
from embcomp.backends.mapped.row_codes import BLOCK, bits_for_rows, packed, stream_bytes
from embcomp.backends.stages import Stage
from embcomp.errors import BudgetError
from embcomp.io.constraints import Between, Ge
from embcomp.layers.block_work import row_blocks
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.row_sources import RowSource
from embcomp.tables.budget import largest_int
from embcomp.tables.footprint import Footprint, TensorFootprint, footprint_of
from embcomp.tables.specs import PhysicalTable, TableSpec, by_name

_FINE = 1 << 20  # steps of a ratio
_FINEST, _COARSEST = -40, 40  # exponents of tolerances that a budget may take, in half octaves


@dataclass(frozen=True, kw_only=True)
class Dedup(BackendConfig):
    """Full tables whose like rows share one when training is done. Ids must lie in `[0, num_embeddings)`.

    Args:
        tolerance: rows share where each of their weights rounds to the same multiple of it; 0 for equal rows.
            With a ratio or a budget it is found, and this is not asked.
        ratio: bytes as those of so large a share of each table's rows and their map.
    """

    tolerance: Annotated[float, Ge(0)] = 0.01
    ratio: Annotated[float | None, Between(0, 1, "(]")] = None

    name: ClassVar[str] = "dedup"
    size_fields: ClassVar[tuple[str, ...]] = ("ratio",)
    learns_size: ClassVar[bool] = True
    approximates: ClassVar[bool] = True

    @override
    def require_size(self) -> None:
        """Without a size, the tolerance decides."""

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return False

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [full_table(table) for table in tables]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        return Full().build(tables)

    @override
    def first_method(self) -> BackendConfig:
        return Full()

    @override
    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(name="dense", purpose="full tables and the network"),
            Stage(
                name="shared",
                purpose="train the rows that are left",
                epochs=1,
                learning_rate=0.1,
                keeps="best_or_start",
            ),
        )

    @override
    def footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        trained = footprint_of(self.physical_tables(tables), served=False)
        return trained + Footprint(tuple(part for table in tables for part in self._served(table)))

    def _served(self, table: TableSpec) -> tuple[TensorFootprint, ...]:
        """The most that is served of a table."""
        rows = max(1, int(table.num_embeddings * (self.ratio or 1)))
        codes = _map_bytes(table.num_embeddings, rows)
        if self.ratio is None or rows * _row_bytes(table) + codes >= table.full_bytes:
            return (_tensor(table, "weights", table.num_embeddings, table.embedding_dim),)
        kept = _tensor(table, "weights", rows, table.embedding_dim)
        return kept, replace(_tensor(table, "codes", codes, 1), itemsize=1)

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        def fits(step: int) -> bool:
            return self._at(step).footprint(tables).serve_bytes <= budget

        step = largest_int(fits, 1, _FINE)
        return None if step is None else self._at(step)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self._at(1)

    def _at(self, step: int) -> Self:
        return self.with_size(ratio=step / _FINE)

    @override
    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        return self.approximate(tables, past)

    @override
    def approximate(self, tables: Sequence[TableSpec], past: StageInputs) -> MethodState:
        rows = {table.name: past.before.rows(table.name) for table in tables}
        if self.ratio is None:
            return _shared(tables, rows, self.tolerance, past.counts)
        allowed = self.footprint(tables).serve_bytes

        def fits(step: int) -> bool:
            groups = _groups(tables, rows, _tolerance(-step))
            return _bytes_of(tables, groups) <= allowed

        if allowed >= sum(table.full_bytes for table in tables):
            return _shared(tables, rows, 0.0, past.counts)
        finest = largest_int(fits, -_COARSEST, -_FINEST)
        if finest is None:
            raise BudgetError(
                f"dedup: even rows rounded to multiples of {_tolerance(_COARSEST):,.0f} take more than the "
                f"{allowed:,} bytes allowed. Raise the budget, or choose another method"
            )
        return _shared(tables, rows, _tolerance(-finest), past.counts)

    @override
    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        rows = {table.name: form.rows(table.name) for table in tables}
        return _shared(tables, rows, 0.0, form.counts)


def _tolerance(half_octaves: int) -> float:
    return float(2 ** (half_octaves / 2))


def _row_bytes(table: TableSpec) -> int:
    return table.embedding_dim * table.itemsize


def _map_bytes(ids: int, rows: int) -> int:
    return stream_bytes(ids, bits_for_rows(rows))


def _tensor(table: TableSpec, role: str, rows: int, columns: int) -> TensorFootprint:
    return TensorFootprint(
        name=f"{table.name}.shared" if role == "weights" else f"{table.name}.codes",
        role="weights" if role == "weights" else "codes",
        rows=rows,
        columns=columns,
        itemsize=table.itemsize,
        train_columns=0,
        lookup=role == "weights",
        trained=False,
    )


def _groups(
    tables: Sequence[TableSpec], rows: Mapping[str, RowSource], tolerance: float
) -> dict[str, Tensor]:
    """By table, (N,) which group of like rows each is in, numbered as they first occur."""
    found = {}
    for table in tables:
        keys = torch.cat(
            [
                _keys(rows[table.name].read(block.start, block.stop), tolerance)
                for block in row_blocks(table.name, table.num_embeddings, table.embedding_dim)
            ]
        )
        _, group = keys.unique(return_inverse=True)
        found[table.name] = _by_first(group)
    return found


def _keys(rows: Tensor, tolerance: float) -> Tensor:
    """(N,) int64 that are equal where rows are alike, and else only once in 2**63 pairs."""
    exact = rows.float() + 0.0  # no negative zeros
    if tolerance:
        cells = (exact.double() / tolerance).round().clamp(-(2.0**62), 2.0**62).long()
    else:
        cells = exact.view(torch.int32).long()
    salts = torch.tensor([table_salt(0, "dedup", column) for column in range(rows.shape[1])])
    return hash_rows(cells, salts, torch.tensor(2**63 - 1)).sum(dim=1)


def _by_first(group: Tensor) -> Tensor:
    """Groups numbered in the order in which they first occur."""
    count = int(group.max()) + 1
    places = torch.arange(len(group))
    first = torch.full((count,), len(group)).scatter_reduce_(0, group, places, "amin")
    numbers = torch.empty_like(first)
    numbers[first.argsort()] = torch.arange(count)
    return numbers[group]


def _bytes_of(tables: Sequence[TableSpec], groups: Mapping[str, Tensor]) -> int:
    counts = {name: int(group.max()) + 1 for name, group in groups.items()}
    return sum(
        counts[table.name] * _row_bytes(table)
        + _map_bytes(table.num_embeddings, counts[table.name])
        for table in tables
    )


def _shared(
    tables: Sequence[TableSpec],
    rows: Mapping[str, RowSource],
    tolerance: float,
    counts: Mapping[str, Tensor],
) -> MethodState:
    """Tables whose like rows share one, or full ones where that takes no fewer bytes."""
    tables = by_name(tables)
    groups = _groups(tables, rows, tolerance)
    if _bytes_of(tables, groups) >= sum(table.full_bytes for table in tables):
        return MethodState.of(Full(), {f"rows.{name}": own for name, own in rows.items()})
    tensors: dict[str, Tensor | RowSource] = {}
    codes, sizes = [], {}
    for table in tables:
        group = groups[table.name]
        sizes[table.name] = (int(group.max()) + 1,)
        tensors[f"rows.{table.name}"] = _means(
            table, rows[table.name], group, counts.get(table.name)
        )
        codes.append(_packed(group, bits_for_rows(sizes[table.name][0])))
    tensors["route.codes"] = torch.cat(codes)
    return MethodState.of(Mapped(rows=sizes), tensors)


def _means(table: TableSpec, rows: RowSource, group: Tensor, counts: Tensor | None) -> Tensor:
    """(groups, D) means of rows, each counted once more than its id is looked up."""
    sums = torch.zeros(int(group.max()) + 1, table.embedding_dim, dtype=torch.float64)
    weights = torch.zeros(len(sums), 1, dtype=torch.float64)
    for block in row_blocks(table.name, table.num_embeddings, table.embedding_dim):
        own = torch.ones(len(block), 1, dtype=torch.float64)
        if counts is not None and len(counts):
            own += counts[block.rows].cpu().double().unsqueeze(1)
        read = rows.read(block.start, block.stop).double()
        sums.index_add_(0, group[block.rows], read * own)
        weights.index_add_(0, group[block.rows], own)
    return (sums / weights).to(rows.dtype)


def _packed(group: Tensor, bits: int) -> Tensor:
    codes = group.numpy()
    parts = [packed(codes[start : start + BLOCK], bits) for start in range(0, len(codes), BLOCK)]
    return torch.from_numpy(np.concatenate(parts))
