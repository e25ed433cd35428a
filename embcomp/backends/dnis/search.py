"""The search form of DNIS: whole rows, times the soft selection of their frequency block.

`embcomp.backends.dnis` cites the papers. Every block of ids of every table has a selection in
[0, 1] for each column, 1 at first. An embedding is its row times its block's selection; what the
search brings to 0 is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig, MethodState, full_table
from embcomp.backends.blocks import column_dtype
from embcomp.backends.dnis.pruning import blocks_form
from embcomp.backends.full import FullRoute, RangeCheck
from embcomp.errors import ConfigError
from embcomp.io.constraints import Ge, Positive
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.frequency_blocks import block_ranges, check_cuts, traffic_cuts
from embcomp.layers.learned_buffers import Penalised
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.named_parts import NamedParts
from embcomp.tables.footprint import Footprint, TensorFootprint, footprint_of
from embcomp.tables.specs import PhysicalTable, TableSpec, by_name

Selection = Literal["free", "prefix"]

_NEVER = 2**63 - 1  # no id reaches it


@dataclass(frozen=True, kw_only=True)
class DNISSearch(BackendConfig):
    """Full tables whose rows are multiplied by the selection of their frequency block.

    Args:
        cuts: for each table by name, the first ids of all its blocks but the first. Tables that
            are not named are cut as if their ids' frequencies followed Zipf's law.
        selection: `free` learns a number for every column of a block; `prefix` one length for
            a block, which selects its first columns and a part of the next.
        l1: factor of the selections' sum in the loss.
        serve_bytes: the penalty rests while the columns that are not closed take no more; None never
            lets it rest.
    """

    cuts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    selection: Selection = "free"
    l1: Annotated[float, Ge(0)] = 1e-3
    serve_bytes: Annotated[int | None, Positive()] = None

    name: ClassVar[str] = "dnis_search"
    learns_size: ClassVar[bool] = True

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return False

    def cuts_of(self, table: TableSpec) -> tuple[int, ...]:
        """The first ids of a table's blocks but the first."""
        cuts = self.cuts.get(table.name)
        if cuts is None:
            return traffic_cuts(table.num_embeddings)
        check_cuts(self.name, table.name, cuts, table.num_embeddings)
        return cuts

    @override
    def holds_whole(self, table: TableSpec) -> bool:
        return True

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        unknown = sorted(set(self.cuts) - {table.name for table in tables})
        if unknown:
            raise ConfigError(
                f"dnis: cuts name {', '.join(unknown)}, which this method does not hold; "
                f"it holds {', '.join(table.name for table in tables)}"
            )
        return [full_table(table) for table in tables]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=FullRoute(keys, RangeCheck(tables)),
            combine=BlockGate(
                [
                    GatedTable(
                        name=table.name,
                        width=table.embedding_dim,
                        cuts=self.cuts_of(table),
                        features=len(table.feature_names),
                        column_bytes=self._column_bytes(table, column_dtype(tables).itemsize),
                    )
                    for table in tables
                ],
                selection=self.selection,
                l1=self.l1,
                budget=self.serve_bytes,
            ),
            needs_unpooled_rows=True,
            needs_context=True,
        )

    def _column_bytes(self, table: TableSpec, index: int) -> tuple[int, ...]:
        """What a column of each block takes when it is served."""
        ranges = block_ranges(self.cuts_of(table), table.num_embeddings)
        return tuple((high - low) * table.itemsize + index for low, high in ranges)

    def _blocks_by_width(self, tables: Sequence[TableSpec]) -> dict[int, int]:
        blocks: dict[int, int] = {}
        for table in tables:
            width = table.embedding_dim
            blocks[width] = blocks.get(width, 0) + len(self.cuts_of(table)) + 1
        return blocks

    @override
    def footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        rows = footprint_of(self.physical_tables(tables), served=False)
        return rows + self._selections(tables) + Footprint(self._most(tables))

    def _selections(self, tables: Sequence[TableSpec]) -> Footprint:
        return Footprint(
            tuple(
                TensorFootprint(
                    name=f"{tables[0].name}.selection_{width}",
                    role="mask",
                    rows=blocks,
                    columns=(columns := width if self.selection == "free" else 1),
                    itemsize=4,
                    train_columns=columns,
                    lookup=False,
                    served=False,
                )
                for width, blocks in self._blocks_by_width(tables).items()
            )
        )

    def _most(self, tables: Sequence[TableSpec]) -> tuple[TensorFootprint, ...]:
        """Each table as it is served if no block loses a column."""
        index = column_dtype(tables).itemsize
        return tuple(
            TensorFootprint(
                name=f"{table.name}.blocks",
                role="weights",
                rows=1,
                columns=table.full_bytes
                + (len(self.cuts_of(table)) + 1) * table.embedding_dim * index,
                itemsize=1,
                train_columns=0,
                lookup=False,
                trained=False,
            )
            for table in tables
        )

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        return self if self.footprint(tables).serve_bytes <= budget else None

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self

    def selections(self, tables: Sequence[TableSpec], form: MethodState) -> dict[str, Tensor]:
        """(blocks, embedding_dim) for each table by name: what multiplies its columns."""
        found: dict[str, Tensor] = {}
        begun: dict[int, int] = {}
        for table in by_name(tables):
            width, blocks = table.embedding_dim, len(self.cuts_of(table)) + 1
            start = begun.get(width, 0)
            begun[width] = start + blocks
            alpha = form.tensors[f"combine.{selection_name(width)}"][start : start + blocks]
            found[table.name] = multipliers(alpha, width)
        return found

    def fresh_selections(self, tables: Sequence[TableSpec]) -> dict[str, Tensor]:
        """The tensors of a form in which every block selects every column."""
        return {
            f"combine.{selection_name(width)}": torch.ones(
                blocks, width if self.selection == "free" else 1
            )
            for width, blocks in self._blocks_by_width(tables).items()
        }

    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """Selections absorbed by the rows; columns that a block closed are gone."""
        selections = self.selections(tables, form)
        return blocks_form(
            tables,
            {table.name: form.rows(table.name) for table in tables},
            selections,
            {name: values > 0 for name, values in selections.items()},
            {table.name: self.cuts_of(table) for table in tables},
            form.work,
        )


def selection_name(width: int) -> str:
    """The selections' name in the state dict of `BlockGate`, for embeddings of one width."""
    return f"selections.{width}.alpha"


def multipliers(alpha: Tensor, width: int) -> Tensor:
    """What selections multiply columns by.

    Args:
        alpha: (L, width) free selections, or (L, 1) lengths as shares of the width.
        width: columns.
    """
    if alpha.shape[1] == width:
        return alpha
    columns = torch.arange(width, device=alpha.device)
    return _between_0_and_1(width * alpha - columns)  # column k is whole at length k + 1


def _between_0_and_1(values: Tensor) -> Tensor:
    """Values cut at 0 and 1, with a gradient of 1 at both.

    A search begins at 1 and must be able to leave it. The gradient of `clamp` there is 1 up to torch
    2.13 and 0 since 2.14.
    """
    one, zero = torch.ones_like(values), torch.zeros_like(values)
    return torch.where(values > 1, one, torch.where(values < 0, zero, values))


class BlockSelections(NamedParts):
    """The selections of all blocks of tables of one width.

    It is a module of its own because a `meta` build is filled module by module.

    Attributes:
        alpha: (blocks, width), or (blocks, 1) for lengths; in [0, 1].

    Args:
        tables: name of each table, and how many blocks it has.
        width: of the tables' rows.
        selection: what is learnt for each block.
    """

    def __init__(
        self, tables: Sequence[tuple[str, int]], width: int, *, selection: Selection
    ) -> None:
        super().__init__()
        self._width = width
        blocks = sum(count for _, count in tables)
        self.store_in_parts("alpha", tables)
        self.alpha = nn.Parameter(torch.ones(blocks, width if selection == "free" else 1))

    def reset_parameters(self) -> None:
        """Everything is selected."""
        nn.init.ones_(self.alpha)

    def forward(self) -> Tensor:
        """(blocks, width) what the columns are multiplied by."""
        return multipliers(self.alpha, self._width)


@dataclass(frozen=True, kw_only=True)
class GatedTable:
    """A table whose rows are multiplied by selections.

    Args:
        name: its name.
        width: of its rows.
        cuts: the first ids of its blocks but the first.
        features: how many look up in it.
        column_bytes: what a column of each block takes when it is served.
    """

    name: str
    width: int
    cuts: Sequence[int]
    features: int
    column_bytes: Sequence[int]


class BlockGate(Penalised):
    """Multiplies rows by the selections of their ids' blocks.

    Args:
        tables: what is looked up in.
        selection: what is learnt for each block.
        l1: factor of the penalty, the sum of all that rows are multiplied by.
        budget: bytes; the penalty is 0 while all columns that are not closed take no more.
    """

    def __init__(
        self,
        tables: Sequence[GatedTable],
        *,
        selection: Selection,
        l1: float,
        budget: int | None,
    ) -> None:
        super().__init__()
        self._l1 = l1
        self._budget = budget
        blocks: dict[int, int] = {}
        owners: dict[int, list[tuple[str, int]]] = {}
        sizes: dict[int, list[int]] = {}
        pairs: list[tuple[int, int, Sequence[int]]] = []  # width, first block, cuts
        for table in tables:
            width = table.width
            pairs += [(width, blocks.get(width, 0), table.cuts)] * table.features
            blocks[width] = blocks.get(width, 0) + len(table.cuts) + 1
            owners.setdefault(width, []).append((table.name, len(table.cuts) + 1))
            sizes.setdefault(width, []).extend(table.column_bytes)
        self._column_bytes = {width: Constant(own) for width, own in sizes.items()}
        self.selections = nn.ModuleDict(
            {
                str(width): BlockSelections(own, width, selection=selection)
                for width, own in owners.items()
            }
        )
        self._first = Constant([first for _, first, _ in pairs])
        most = max(len(cuts) for _, _, cuts in pairs)
        padded = [[*cuts, *[_NEVER] * (most - len(cuts))] for _, _, cuts in pairs]
        self._cuts = Constant([cut for cuts in padded for cut in cuts], (len(pairs), most))
        widths = [width for width, _, _ in pairs]
        self._pairs = {
            width: Constant([n for n, own in enumerate(widths) if own == width]) for width in blocks
        }
        self._order = _order(widths) if len(blocks) > 1 else None

    @override
    def forward(self, rows: Tensor, looked_up: LookupContext) -> Tensor:
        # (R, sum of widths) -> (R, sum of widths)
        ids = looked_up.ids()  # (R, P)
        block = self._first.on(ids.device).expand_as(ids).clone()
        for cut in self._cuts.on(ids.device).unbind(1):
            block += ids >= cut
        parts, penalties, taken = [], [], []
        for width, selections in self.selections.items():
            values = selections()
            penalties.append(values.sum())
            sizes = self._column_bytes[int(width)].on(ids.device)
            taken.append(((values > 0).sum(1) * sizes).sum())
            own = block.index_select(1, self._pairs[int(width)].on(ids.device))
            parts.append(values.index_select(0, own.reshape(-1)).view(len(rows), -1))
        gates = parts[0] if self._order is None else torch.cat(parts, dim=1)
        if self._order is not None:
            gates = gates.index_select(1, self._order.on(gates.device))
        self._penalise(penalties, taken)
        return rows * gates

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        device = parts[0].device
        penalties, taken, by_width = [], [], {}
        for width, selections in self.selections.items():
            by_width[int(width)] = values = selections()
            penalties.append(values.sum())
            taken.append(((values > 0).sum(1) * self._column_bytes[int(width)].on(device)).sum())
        self._penalise(penalties, taken)
        gated = []
        firsts, cuts = self._first.on(device), self._cuts.on(device)
        for n, (part, ids) in enumerate(zip(parts, looked_up.each_ids())):
            block = firsts[n] + torch.bucketize(ids, cuts[n], right=True)
            gated.append(part * by_width[part.shape[1]].index_select(0, block))
        return gated

    def _penalise(self, selected: Sequence[Tensor], taken: Sequence[Tensor]) -> None:
        """Set the penalty.

        Args:
            selected: the sum of the selections of each width.
            taken: bytes of the columns that are not closed, of each width.
        """
        self.penalty = None
        if self.training:
            self.penalty = self._l1 * torch.stack(list(selected)).sum()
            if self._budget is not None:
                self.penalty = self.penalty * (torch.stack(list(taken)).sum() > self._budget)


def _order(widths: Sequence[int]) -> Constant:
    """Where the columns of pairs in order are among those of pairs grouped by width."""
    starts, start = {}, 0
    for width in dict.fromkeys(widths):
        for pair, own in enumerate(widths):
            if own == width:
                starts[pair] = start
                start += width
    return Constant(
        [starts[pair] + column for pair, width in enumerate(widths) for column in range(width)]
    )
