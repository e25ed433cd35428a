"""What a search leaves, cut to a budget of bytes: columns of blocks, or single elements.

Columns are chosen by what they contribute for their bytes, as in a fractional knapsack: the best
column that no longer fits goes to the most frequent ids of its block only, which makes one block
more and uses the budget to a few bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from embcomp.backends.base import MethodState
from embcomp.backends.blocks import Blocks, block_table, column_dtype
from embcomp.errors import BudgetError
from embcomp.layers.block_work import IN_MEMORY, RowBlock, Work, row_blocks
from embcomp.layers.frequency_blocks import block_ranges
from embcomp.layers.row_sources import RowSource, as_rows
from embcomp.tables.specs import TableSpec, by_name

Cuts = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The columns that blocks keep.

    Args:
        cuts: for each table by name, the first ids of all its blocks but the first.
        kept: for each table by name, (blocks, embedding_dim) whether a column is kept.
        source: for each table by name, the block of the search that each block was part of.
    """

    cuts: dict[str, tuple[int, ...]]
    kept: dict[str, Tensor]
    source: dict[str, list[int]]


@dataclass(frozen=True, kw_only=True, order=True)
class _Candidate:
    """A column of a block and the bytes that it takes; the order is that of preference."""

    minus_worth: float
    table: int
    block: int
    column: int
    cost: int = field(compare=False)


def column_scores(
    table: TableSpec,
    rows: RowSource | Tensor,
    selections: Tensor,
    cuts: Sequence[int],
    *,
    nested: bool,
    work: Work = IN_MEMORY,
) -> Tensor:
    """How much the columns of a table's blocks contribute: selection times root mean square.

    Args:
        table: the table.
        rows: (num_embeddings, embedding_dim) its weights.
        selections: (blocks, embedding_dim) what multiplies them.
        cuts: the first ids of the blocks but the first.
        nested: whether no column may score above one before it.
        work: measures the rows.

    Returns:
        (blocks, embedding_dim) float64.
    """
    source, ranges = as_rows(rows), block_ranges(cuts, table.num_embeddings)

    def squares(block: RowBlock) -> dict[str, Tensor]:
        return {"sum": source.read(block.start, block.stop).to(torch.float64).square().sum(0)}

    parts = [
        (place, part)
        for place, (low, high) in enumerate(ranges)
        for part in row_blocks(
            table.name, table.num_embeddings, table.embedding_dim, start=low, stop=high
        )
    ]
    sums = torch.zeros(len(ranges), table.embedding_dim, dtype=torch.float64)
    found = work.map(f"squares-{table.name}", squares, [part for _, part in parts])
    for (place, _), each in zip(parts, found):
        sums[place] += each["sum"]
    lengths = torch.tensor([high - low for low, high in ranges], dtype=torch.float64)
    scores = (sums / lengths[:, None]).sqrt() * selections.to(torch.float64)
    return scores.cummin(1).values if nested else scores


def block_traffic(
    table: TableSpec, counts: Tensor | None, cuts: Sequence[int], most: float
) -> list[float]:
    """Look-ups of a table's blocks, as shares of the table's.

    Args:
        table: the table.
        counts: (num_embeddings,) how often each id occurs; alike where nobody counted.
        cuts: the first ids of the blocks but the first.
        most: what the shares add up to.
    """
    ranges = block_ranges(cuts, table.num_embeddings)
    if counts is None or not counts.numel() or not bool(counts.any()):
        sums = [float(high - low) for low, high in ranges]
    else:
        sums = [float(counts[low:high].sum()) for low, high in ranges]
    return [most * own / sum(sums) for own in sums]


def choose_columns(
    tables: Sequence[TableSpec],
    scores: Mapping[str, Tensor],
    cuts: Cuts,
    budget: int,
    counts: Mapping[str, Tensor] | None = None,
) -> Chosen:
    """The columns that contribute most for their bytes, within a budget.

    What a column contributes is the square of its score, once for each look-up of its block, over the
    square of its rank among the block's columns. A search leaves columns of like size, but what is
    kept is retrained and takes over what was cut: a block's loss falls about as one over its width,
    so its next column is worth about one over that width's square. Of equal scores, widths then
    follow the square root of an id's mean look-ups. Columns of score 0 are never kept, so less than
    the budget is used where the search closed more than it had to.

    Args:
        tables: the tables.
        scores: for each by name, (blocks, embedding_dim).
        cuts: the blocks.
        budget: bytes of rows and of column lists together.
        counts: for each by name, (num_embeddings,) how often each id occurs.

    Raises:
        BudgetError: when it does not hold one number of one row.
    """
    index = column_dtype(tables).itemsize
    sizes = {
        t.name: [h - l for l, h in block_ranges(cuts[t.name], t.num_embeddings)] for t in tables
    }
    tables = by_name(tables)
    candidates: list[_Candidate] = []
    for n, table in enumerate(tables):
        traffic = block_traffic(
            table, (counts or {}).get(table.name), cuts[table.name], len(table.feature_names)
        )
        for block, row in enumerate(scores[table.name].tolist()):
            cost = sizes[table.name][block] * table.itemsize + index
            candidates += _of_block(row, traffic[block], cost, table=n, block=block)
    chosen = Chosen(
        cuts=dict(cuts),
        kept={t.name: torch.zeros(scores[t.name].shape, dtype=torch.bool) for t in tables},
        source={t.name: list(range(len(sizes[t.name]))) for t in tables},
    )
    left = budget
    for candidate in sorted(candidates):
        table = tables[candidate.table]
        if candidate.cost > left:
            _split(chosen, table, candidate, left, index)
            break
        chosen.kept[table.name][candidate.block, candidate.column] = True
        left -= candidate.cost
    if not any(bool(kept.any()) for kept in chosen.kept.values()):
        _keep_one(chosen, tables, budget, index)
    return chosen


def _of_block(
    scores: Sequence[float], lookups: float, cost: int, *, table: int, block: int
) -> Iterator[_Candidate]:
    """The columns of a block that the search did not close, the highest score first."""
    ranked = sorted(enumerate(scores), key=lambda entry: -entry[1])
    for rank, (column, score) in enumerate(ranked, start=1):
        if score > 0:
            yield _Candidate(
                minus_worth=-lookups * (score / rank) ** 2 / cost,
                table=table,
                block=block,
                column=column,
                cost=cost,
            )


def _split(chosen: Chosen, table: TableSpec, candidate: _Candidate, left: int, index: int) -> None:
    """Give a column to as many of a block's first ids as the bytes that are left can hold."""
    kept, cuts = chosen.kept[table.name], chosen.cuts[table.name]
    own = kept[candidate.block]
    rows = (left - (int(own.sum()) + 1) * index) // table.itemsize
    if rows < 1:
        return
    low = (0, *cuts)[candidate.block]
    head = own.clone()
    head[candidate.column] = True
    at = candidate.block
    chosen.cuts[table.name] = (*cuts[:at], low + rows, *cuts[at:])
    chosen.kept[table.name] = torch.cat([kept[:at], head[None], kept[at:]])
    chosen.source[table.name].insert(at, at)


def _keep_one(chosen: Chosen, tables: Sequence[TableSpec], budget: int, index: int) -> None:
    """A collection without any row cannot be built: the first column of some rows stays."""
    table = min(tables, key=lambda table: (table.itemsize, table.num_embeddings))
    if budget < table.itemsize + index:
        raise BudgetError(
            f"dnis: {budget:,} bytes do not hold one number and the index of its column, which "
            f"take {table.itemsize + index}. Raise the budget."
        )
    rows = min((budget - index) // table.itemsize, table.num_embeddings)
    kept = torch.zeros(1, table.embedding_dim, dtype=torch.bool)
    kept[0, 0] = True
    chosen.cuts[table.name], chosen.source[table.name] = (), [0]
    if rows < table.num_embeddings:
        kept = torch.cat([kept, torch.zeros_like(kept)])
        chosen.cuts[table.name], chosen.source[table.name] = (rows,), [0, 0]
    chosen.kept[table.name] = kept


def blocks_form(
    tables: Sequence[TableSpec],
    rows: Mapping[str, RowSource | Tensor],
    selections: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    cuts: Cuts,
    work: Work = IN_MEMORY,
) -> MethodState:
    """Dense blocks of the columns that are kept, selections absorbed.

    Args:
        tables: the tables.
        rows: for each by name, (num_embeddings, embedding_dim) weights.
        selections: for each by name, (blocks, embedding_dim) what multiplies them.
        kept: for each by name, (blocks, embedding_dim) whether a column is kept; if none is at
            all, a column of the smallest block is, so that there is something to look up.
        cuts: for each by name, the first ids of all its blocks but the first.
        work: does it.
    """
    if not any(bool(each.any()) for each in kept.values()):
        kept = _with_one(tables, kept, cuts)
    widths: dict[str, tuple[int, ...]] = {}
    starts: dict[str, tuple[int, ...]] = {}
    tensors: dict[str, Tensor | RowSource] = {}
    columns: list[Tensor] = []
    for table in by_name(tables):
        name = table.name
        merged = _equal_neighbours(kept[name])
        ranges = block_ranges(cuts[name], table.num_embeddings)
        starts[name] = tuple(ranges[blocks[0]][0] for blocks in merged[1:])
        widths[name] = tuple(int(kept[name][blocks[0]].sum()) for blocks in merged)
        for index, blocks in enumerate(merged):
            own = kept[name][blocks[0]].nonzero().flatten()
            if len(own):
                columns.append(own)
                made = _BlockRows(
                    rows=as_rows(rows[name]),
                    ranges=[ranges[b] for b in blocks],
                    selections=selections[name][blocks][:, own],
                    columns=own,
                )
                physical = block_table(name, index)
                tensors[f"rows.{physical}"] = made.write(work, physical)
    tensors["combine.columns"] = torch.cat(columns).to(column_dtype(tables))
    return MethodState.of(Blocks(widths=widths, cuts=starts), tensors)


@dataclass(frozen=True, kw_only=True)
class _BlockRows:
    """The rows of a physical table: some columns of blocks that follow each other.

    Args:
        rows: (num_embeddings, embedding_dim) of the logical table.
        ranges: the blocks' ids.
        selections: (blocks, columns) what multiplies them.
        columns: (columns,) those that are kept.
    """

    rows: RowSource
    ranges: Sequence[tuple[int, int]]
    selections: Tensor
    columns: Tensor

    def write(self, work: Work, physical: str) -> RowSource:
        """Absorb the selections.

        Args:
            work: does it.
            physical: the physical table's name.
        """
        places = {
            part: place
            for place, (low, high) in enumerate(self.ranges)
            for part in row_blocks(
                physical, len(self.rows), self.rows.shape[1], start=low, stop=high
            )
        }

        def absorb(part: RowBlock) -> Tensor:
            rows = self.rows.read(part.start, part.stop)[:, self.columns]
            return (rows * self.selections[places[part]]).to(self.rows.dtype)

        shape = (self.ranges[-1][1] - self.ranges[0][0], len(self.columns))
        return work.write(f"rows.{physical}", absorb, list(places), shape, self.rows.dtype)


def _equal_neighbours(kept: Tensor) -> list[list[int]]:
    """Run of blocks that keep the same columns, so that one table can hold them."""
    runs: list[list[int]] = []
    for block, own in enumerate(kept):
        if runs and torch.equal(kept[runs[-1][-1]], own):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _with_one(
    tables: Sequence[TableSpec], kept: Mapping[str, Tensor], cuts: Cuts
) -> dict[str, Tensor]:
    """The same with the first column of the smallest block."""
    sizes = [
        (high - low, table.name, block)
        for table in tables
        for block, (low, high) in enumerate(block_ranges(cuts[table.name], table.num_embeddings))
    ]
    _, name, block = min(sizes)
    changed = {other: each.clone() for other, each in kept.items()}
    changed[name][block, 0] = True
    return changed
