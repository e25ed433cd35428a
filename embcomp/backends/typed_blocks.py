"""Row types by frequency: blocks of ids, each served in a type of its own.

The serving half of mixed-precision embeddings: MPE (Li et al., 2024, https://arxiv.org/abs/2409.20305) learns a
precision for groups of ids of like frequency, SHARK (Zhang et al., CIKM 2023, https://arxiv.org/abs/2308.09395) gives
rows fp32, fp16 or int8 by how often they are read. Here blocks are `blocks` of whole rows, each a physical table with a
type of its own, from fp32 to int4 with a scale for each row.

Where we depart. Types are chosen of trained rows, by the error that each would make of them: the sum over look-ups of the
squared difference, the most error for each byte first, until the budget is used (`row_type_choice`). Nothing of that is
learnt, in training rows are floats, and training goes on from the chosen form as from any other. MPE's sampling over
bit widths and its 2, 3, 5 and 6 bits are not here: FBGEMM's kernels serve 8 and 4. SHARK's positive and negative look-ups
weigh alike. Where no rows are at hand, as when a run is planned, errors are those of fresh rows and look-ups those of
Zipf's law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType
from typing_extensions import Self, override

from embcomp.backends.base import MethodState, StageInputs
from embcomp.backends.blocks import UNRANKED, Blocks, IdBlock, block_table
from embcomp.backends.row_type_choice import TypedBlock, choose_types
from embcomp.errors import ConfigError
from embcomp.io.constraints import Between
from embcomp.layers.block_work import RowBlock, row_blocks
from embcomp.layers.frequency_blocks import TRAFFIC_QUANTILES, block_ranges, traffic_cuts
from embcomp.layers.id_counts import check_ranked
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.row_formats import ROW_TYPES, RowType
from embcomp.tables.row_types import check_row_type, pack, unpack
from embcomp.tables.specs import PhysicalTable, TableSpec

_FP16 = 2.0**-12  # of a weight, the deviation of its rounding to fp16, about


@dataclass(frozen=True, kw_only=True)
class TypedBlocks(Blocks):
    """Whole rows in blocks of ids, each block in a type of its own.

    Args:
        types: for each table by name, the row type of each of its blocks, in the order of ids. A table that is
            not named is served as it was trained; a budget chooses.
        cuts: for each table by name, the first ids of all its blocks but the first; where a budget chooses,
            those at `quantiles` by default.
        quantiles: shares of all look-ups below which blocks end.
        widths: for each table by name, how many columns each of its blocks keeps; all by default.
    """

    types: Mapping[str, tuple[RowType, ...]] = field(default_factory=dict)
    quantiles: Annotated[tuple[float, ...], Between(0, 1, "()")] = TRAFFIC_QUANTILES

    name: ClassVar[str] = "typed_blocks"
    learns_size: ClassVar[bool] = True
    approximates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.quantiles) != sorted(set(self.quantiles)):
            raise ConfigError(f"typed_blocks: quantiles must rise, got {list(self.quantiles)}")
        for table, types in self.types.items():
            blocks = len(self.cuts.get(table, ())) + 1
            if isinstance(types, str) or len(types) != blocks:
                raise ConfigError(
                    f"typed_blocks: table {table!r} has {blocks} block(s), so types must be as many of "
                    f"{', '.join(ROW_TYPES)}; got {types!r}"
                )
            for each in types:
                check_row_type(each)

    @override
    def require_size(self) -> None:
        """Types decide; without them and a budget, rows would be what they are in `full` tables."""
        if not self.types:
            raise ConfigError(
                "typed_blocks: the size is open; give the types of tables' blocks, or give the plan a budget"
            )

    @override
    def blocks(self, table: TableSpec) -> list[IdBlock]:
        if table.name in self.widths:
            return super().blocks(table)
        ranges = block_ranges(self.cuts.get(table.name, ()), table.num_embeddings)
        whole = replace(self, widths={table.name: (table.embedding_dim,) * len(ranges)})
        return super(TypedBlocks, whole).blocks(table)

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        chosen = [self._type_of(table, block) for table in tables for block in self.blocks(table)]
        return [
            replace(physical, row_type=row_type)
            for physical, row_type in zip(super().physical_tables(tables), chosen, strict=True)
        ]

    def _type_of(self, table: TableSpec, block: IdBlock) -> RowType | None:
        if table.name not in self.types:
            return None
        chosen = self.types[table.name][block.index]
        return "fp16" if chosen == "fp32" and table.data_type is DataType.FP16 else chosen

    @override
    def fit_rows(self, tables: Sequence[TableSpec], budget: int, past: StageInputs) -> Self:
        """Types by the errors of these rows, weighted by how often ids are looked up."""
        self.fit_budget(tables, budget)  # or nothing fits, which it says
        cut = self._cut(tables, past.counts)
        for table in tables:
            check_ranked(self.name, table, past.counts, cut.cuts.get(table.name, ()), UNRANKED)
        found = cut._chosen(tables, budget, cut._errors(tables, past))
        return self.fit_budget(tables, budget) if found is None else found

    @override
    def approximate(self, tables: Sequence[TableSpec], past: StageInputs) -> MethodState:
        rows: dict[str, Tensor | RowSource] = {}
        for table in tables:
            whole = past.before.rows(table.name)
            for block in self.blocks(table):
                own = whole.range(block.low, block.high).first_columns(block.width)
                rows[f"rows.{block_table(table.name, block.index)}"] = _rounded(
                    own, self._type_of(table, block)
                )
        return MethodState.of(self, rows)

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        if self.types:
            fixed = replace(self, budget=None)
            return fixed if fixed.footprint(tables).serve_bytes <= budget else None
        cut = self._cut(tables, {})
        errors = {
            (table.name, block.index): _fresh_errors(table, block)
            for table in tables
            for block in cut.blocks(table)
        }
        return cut._chosen(tables, budget, errors)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        if self.types:
            return replace(self, budget=None)
        cut = self._cut(tables, {})
        shortest = {
            table.name: tuple(
                self._typed(table, block, {}).ladder()[0] for block in cut.blocks(table)
            )
            for table in tables
        }
        return replace(cut, types=shortest)

    def _cut(self, tables: Sequence[TableSpec], counts: Mapping[str, Tensor]) -> Self:
        """This with the blocks of every table, their types open."""
        cuts = {
            table.name: traffic_cuts(table.num_embeddings, counts.get(table.name), self.quantiles)
            for table in tables
            if table.name not in self.cuts
        }
        return replace(self, budget=None, types={}, cuts={**self.cuts, **cuts})

    def _typed(
        self, table: TableSpec, block: IdBlock, errors: Mapping[RowType, float]
    ) -> TypedBlock:
        kinds = ROW_TYPES[1:] if table.data_type is DataType.FP16 else ROW_TYPES
        return TypedBlock(
            table=table.name,
            index=block.index,
            rows=block.high - block.low,
            width=block.width,
            errors={kind: errors.get(kind, 0.0) for kind in kinds},
        )

    def _chosen(
        self,
        tables: Sequence[TableSpec],
        budget: int,
        errors: Mapping[tuple[str, int], Mapping[RowType, float]],
    ) -> Self | None:
        """This with the types that fit a budget; None where none do."""
        beside = self.dense_footprint(tables).serve_bytes
        blocks = [
            self._typed(table, block, errors[table.name, block.index])
            for table in tables
            for block in self.blocks(table)
        ]
        chosen = choose_types(blocks, budget - beside)
        if chosen is None:
            return None
        types: dict[str, list[RowType]] = {
            table.name: ["fp32"] * (len(self.cuts[table.name]) + 1) for table in tables
        }
        for block, each in zip(blocks, chosen):
            types[block.table][block.index] = each
        return replace(self, types={name: tuple(own) for name, own in types.items()})

    def _errors(
        self, tables: Sequence[TableSpec], past: StageInputs
    ) -> dict[tuple[str, int], dict[RowType, float]]:
        """By block and type, what its rows are off, squared and summed over look-ups."""
        found = {}
        for table in tables:
            rows, counts = past.before.rows(table.name), past.counts.get(table.name)
            for block in self.blocks(table):
                parts = row_blocks(
                    block_table(table.name, block.index),
                    len(rows),
                    rows.shape[1],
                    start=block.low,
                    stop=block.high,
                )

                def measured(
                    part: RowBlock,
                    rows: RowSource = rows,
                    counts: Tensor | None = counts,
                    width: int = block.width,
                ) -> dict[str, Tensor]:
                    own = rows.read(part.start, part.stop)[:, :width].float()
                    weights = None if counts is None else counts[part.rows]
                    return {"errors": _squared_errors(own, weights)}

                name = f"types-{table.name}-{block.index}"
                sums = sum(each["errors"] for each in past.work.map(name, measured, parts))
                found[table.name, block.index] = dict(
                    zip(ROW_TYPES, torch.as_tensor(sums).tolist())
                )
        return found


def _squared_errors(rows: Tensor, counts: Tensor | None) -> Tensor:
    """(types,) float64 of (N, width) rows, each weighted by its (N,) count."""
    weights = (
        torch.ones(len(rows), dtype=torch.float64) if counts is None else counts.double().cpu()
    )
    found = []
    for kind in ROW_TYPES:
        off = rows - unpack(pack(rows, kind), rows.shape[1], kind)
        found.append(off.double().square().sum(dim=1) @ weights)
    return torch.stack(found)


def _fresh_errors(table: TableSpec, block: IdBlock) -> dict[RowType, float]:
    """What rows drawn anew would be off, looked up as Zipf has it."""
    looked_up = math.log((block.high + 1) / (block.low + 1)) / math.log(table.num_embeddings + 1)
    low, high = table.init_bounds
    variance = (high - low) ** 2 / 12
    errors: dict[RowType, float] = {
        "fp32": 0.0,
        "fp16": _FP16**2 * variance,
        "int8": variance / 255**2,
        "int4": variance / 15**2,
    }
    return {kind: looked_up * block.width * error for kind, error in errors.items()}


def _rounded(rows: RowSource, row_type: RowType | None) -> RowSource:
    """Rows as they are once they have been stored in a type; what is stored of these is the same again."""
    if row_type is None or row_type == "fp32":
        return rows

    def read(start: int, stop: int) -> Tensor:
        own = rows.read(start, stop)
        for _ in range(2):  # the first rounding moves a row's range a little, the second keeps it
            own = unpack(pack(own.float(), row_type), own.shape[1], row_type)
        return own.to(rows.dtype)

    return ComputedRows(rows.shape, rows.dtype, read, of=[rows])
