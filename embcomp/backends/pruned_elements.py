"""Trained tables cut to a budget element by element: sparse rows of the largest weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from embcomp.backends.base import MethodState
from embcomp.backends.blocks import column_dtype
from embcomp.backends.sparse import Sparse, pointer_dtype
from embcomp.errors import BudgetError
from embcomp.layers.best_values import BestValues
from embcomp.layers.block_work import IN_MEMORY, RowBlock, Work, row_blocks
from embcomp.layers.row_sources import ComputedRows, RowSource, as_rows
from embcomp.tables.specs import TableSpec, by_name


def least_element_bytes(tables: Sequence[TableSpec]) -> int:
    """Pointers of all rows, and one element."""
    itemsize = _pointer_itemsize(tables)
    pointers = sum(table.num_embeddings + 1 for table in tables) * itemsize
    return pointers + max(table.itemsize for table in tables) + column_dtype(tables).itemsize


def most_elements(tables: Sequence[TableSpec], budget: int) -> Sparse:
    """Sparse rows of as many elements as a budget may leave, alike in all tables."""
    per_element = min(table.itemsize for table in tables) + column_dtype(tables).itemsize
    whole = {table.name: table.num_embeddings * table.embedding_dim for table in tables}
    share = min(1.0, budget / per_element / sum(whole.values()))
    return Sparse(nonzeros={name: max(1, int(count * share)) for name, count in whole.items()})


def elements_form(
    tables: Sequence[TableSpec],
    rows: Mapping[str, RowSource | Tensor],
    selections: Mapping[str, Tensor],
    cuts: Mapping[str, tuple[int, ...]],
    budget: int,
    initial: Mapping[str, RowSource | Tensor] | None = None,
    work: Work = IN_MEMORY,
    *,
    method: str = "dnis",
    way_out: str = "Raise the budget, or prune by block (structure: block).",
) -> MethodState:
    """Sparse rows of the largest products of selection and weight, within a budget.

    Ties are broken by place: the table's, then the id, then the column. Zeros are never kept.

    Args:
        tables: the tables.
        rows: for each by name, (num_embeddings, embedding_dim) weights.
        selections: for each by name, (blocks, embedding_dim) what multiplies them.
        cuts: for each by name, the first ids of all its blocks but the first.
        budget: bytes of values, columns and pointers together.
        initial: for each by name, (num_embeddings, embedding_dim) what is kept in the places of the
            largest products, in place of the products.
        work: does it.
        method: that asks, for errors.
        way_out: what it offers where the budget does not do.

    Raises:
        BudgetError: when it does not hold the pointers and one element.
    """
    least = least_element_bytes(tables)
    if budget < least:
        raise BudgetError(
            f"{method}: {budget:,} bytes do not hold sparse rows: their pointers and one element take "
            f"{least:,} bytes. {way_out}"
        )
    tables = by_name(tables)
    products = {
        table.name: _products(as_rows(rows[table.name]), selections[table.name], cuts[table.name])
        for table in tables
    }
    kept = _largest(tables, products, budget, work)
    weights = products if initial is None else {n: as_rows(each) for n, each in initial.items()}
    return _sparse_form(tables, weights, kept, work)


def _products(rows: RowSource, selections: Tensor, cuts: Sequence[int]) -> RowSource:
    """Rows times the selections of their blocks."""
    starts = torch.tensor([*cuts, len(rows)])

    def product(start: int, stop: int) -> Tensor:
        which = torch.searchsorted(starts, torch.arange(start, stop), right=True)
        return (rows.read(start, stop) * selections[which]).to(rows.dtype)

    return ComputedRows(rows.shape, rows.dtype, product, of=[rows])


def _sizes(products: RowSource) -> RowSource:
    """What elements are ranked by; those of 0 are never kept."""

    def size(start: int, stop: int) -> Tensor:
        values = products.read(start, stop).abs().float()
        return torch.where(values > 0, values, -torch.inf)

    return ComputedRows(products.shape, torch.float32, size, of=[products])


def _largest(
    tables: Sequence[TableSpec], products: Mapping[str, RowSource], budget: int, work: Work
) -> dict[str, RowSource]:
    """For each table, (num_embeddings, embedding_dim) which elements are kept."""
    empty = {name: _constant_mask(each, first=False) for name, each in products.items()}
    stored = list(tables)
    while True:  # a table that keeps nothing needs no pointers, which leaves room for others
        sizes = {table.name: _sizes(products[table.name]) for table in stored}
        name = "-".join(["elements", *sizes])
        best, most = BestValues(work, name, sizes), _room(stored, budget)
        cut = best.cut(lambda counts, most=most: sum(counts.values()) <= most)  # type: ignore[misc]
        assert cut is not None
        keeping = [table for table in stored if cut.counts[table.name]]
        if len(keeping) == len(stored):
            return empty | best.kept(cut)
        if not keeping:  # a collection without any row cannot be built
            one = stored[0].name
            return empty | {one: _constant_mask(products[one], first=True)}
        stored = keeping


def _room(tables: Sequence[TableSpec], budget: int) -> int:
    """How many elements of these tables a budget holds."""
    per_element = max(table.itemsize for table in tables) + column_dtype(tables).itemsize
    return (budget - least_element_bytes(tables)) // per_element + 1


def _constant_mask(like: RowSource, *, first: bool) -> RowSource:
    """Nothing is kept, or the very first element alone."""

    def mask(start: int, stop: int) -> Tensor:
        found = torch.zeros(stop - start, like.shape[1], dtype=torch.bool)
        if first and start == 0 < stop:
            found[0, 0] = True
        return found

    return ComputedRows(like.shape, torch.bool, mask)


def _sparse_form(
    tables: Sequence[TableSpec],
    weights: Mapping[str, RowSource],
    kept: Mapping[str, RowSource],
    work: Work,
) -> MethodState:
    blocks = {t.name: row_blocks(t.name, t.num_embeddings, t.embedding_dim) for t in tables}
    counts = _count_kept(blocks, kept, work)
    nonzeros = {name: sum(own) for name, own in counts.items()}
    stored = {name: own for name, own in blocks.items() if nonzeros[name]}
    tensors: dict[str, Tensor | RowSource] = {
        f"rows.{name}": _write_values(name, own, counts[name], weights[name], kept[name], work)
        for name, own in stored.items()
    }
    dtype = pointer_dtype(list(nonzeros.values()))
    tensors["route.pointers"] = _write_pointers(stored, counts, kept, dtype, work)
    tensors["route.columns"] = _write_columns(stored, counts, kept, column_dtype(tables), work)
    return MethodState.of(Sparse(nonzeros=nonzeros), tensors)


BlocksOf = Mapping[str, Sequence[RowBlock]]
CountsOf = Mapping[str, Sequence[int]]


def _count_kept(
    blocks: BlocksOf, kept: Mapping[str, RowSource], work: Work
) -> dict[str, list[int]]:
    """For each table, how many elements each of its blocks keeps."""
    everything = [block for own in blocks.values() for block in own]
    counts: dict[str, list[int]] = {name: [] for name in blocks}

    def count(block: RowBlock) -> dict[str, Tensor]:
        return {"kept": kept[block.table].read(block.start, block.stop).sum()}

    for block, found in zip(everything, work.map("kept", count, everything)):
        counts[block.table].append(int(found["kept"]))
    return counts


def _write_values(
    name: str,
    blocks: Sequence[RowBlock],
    counts: Sequence[int],
    weights: RowSource,
    kept: RowSource,
    work: Work,
) -> RowSource:
    def values(block: RowBlock) -> Tensor:
        mask = kept.read(block.start, block.stop)
        return weights.read(block.start, block.stop)[mask].unsqueeze(1)

    shape = (sum(counts), 1)
    return work.write(f"rows.{name}", values, blocks, shape, weights.dtype, sizes=counts)


def _write_pointers(
    blocks: BlocksOf,
    counts: CountsOf,
    kept: Mapping[str, RowSource],
    dtype: torch.dtype,
    work: Work,
) -> RowSource:
    """Where each row's elements begin in its table, and where the last one's end."""
    before = {
        block: start
        for name, own in blocks.items()
        for block, start in zip(own, accumulate(counts[name], initial=0))
    }
    sizes = [len(block) + (block.start == 0) for block in before]

    def pointers(block: RowBlock) -> Tensor:
        ends = kept[block.table].read(block.start, block.stop).sum(1).cumsum(0)
        first = ends.new_zeros(1 if block.start == 0 else 0)
        return (torch.cat([first, ends]) + before[block]).to(dtype)

    shape = (sum(sizes),)
    return work.write("pointers", pointers, list(before), shape, dtype, sizes=sizes)


def _write_columns(
    blocks: BlocksOf,
    counts: CountsOf,
    kept: Mapping[str, RowSource],
    dtype: torch.dtype,
    work: Work,
) -> RowSource:
    """The elements' columns."""
    everything = [block for own in blocks.values() for block in own]
    sizes = [count for name in blocks for count in counts[name]]

    def columns(block: RowBlock) -> Tensor:
        return kept[block.table].read(block.start, block.stop).nonzero()[:, 1].to(dtype)

    return work.write("columns", columns, everything, (sum(sizes),), dtype, sizes=sizes)


def _pointer_itemsize(tables: Sequence[TableSpec]) -> int:
    return pointer_dtype([t.num_embeddings * t.embedding_dim for t in tables]).itemsize
