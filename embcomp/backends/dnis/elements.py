"""What a search leaves, cut to a budget element by element, as the paper prunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from embcomp.backends.base import MethodState
from embcomp.backends.blocks import column_dtype
from embcomp.backends.sparse import Sparse, pointer_dtype
from embcomp.errors import BudgetError
from embcomp.layers.frequency_blocks import block_ranges
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
    rows: Mapping[str, Tensor],
    selections: Mapping[str, Tensor],
    cuts: Mapping[str, tuple[int, ...]],
    budget: int,
    initial: Mapping[str, Tensor] | None = None,
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

    Raises:
        BudgetError: when it does not hold the pointers and one element.
    """
    least = least_element_bytes(tables)
    if budget < least:
        raise BudgetError(
            f"dnis: {budget:,} bytes do not hold sparse rows: their pointers and one element take "
            f"{least:,} bytes. Raise the budget, or prune by block (structure: block)."
        )
    tables = by_name(tables)
    products = {
        table.name: _product(table, rows[table.name], selections[table.name], cuts[table.name])
        for table in tables
    }
    stored = list(tables)
    while True:  # a table that keeps nothing needs no pointers, which leaves room for others
        masks = _largest_within(stored, products, budget)
        keeping = [table for table in stored if bool(masks[table.name].any())]
        if len(keeping) == len(stored):
            break
        if not keeping:  # a collection without any row cannot be built
            masks[stored[0].name][0, 0] = True
            break
        stored = keeping
    empty = {
        table.name: torch.zeros_like(products[table.name], dtype=torch.bool) for table in tables
    }
    return _sparse_form(tables, initial or products, empty | masks)


def _largest_within(
    tables: Sequence[TableSpec], products: Mapping[str, Tensor], budget: int
) -> dict[str, Tensor]:
    """For each table, whether an element is among the largest that these tables have room for."""
    per_element = max(table.itemsize for table in tables) + column_dtype(tables).itemsize
    count = (budget - least_element_bytes(tables)) // per_element + 1
    own = [products[table.name] for table in tables]
    kept = largest(torch.cat([product.abs().flatten().float() for product in own]), count)
    parts = kept.split([product.numel() for product in own])
    return {table.name: part.view_as(p) for table, part, p in zip(tables, parts, own)}


def largest(values: Tensor, count: int) -> Tensor:
    """(n,) whether each of (n,) non-negative values is among the `count` largest that are not 0."""
    kept = values > 0
    if int(kept.sum()) <= count:
        return kept
    threshold = values.kthvalue(len(values) - count + 1).values
    kept = values > threshold
    ties = (values == threshold).nonzero().flatten()
    kept[ties[: count - int(kept.sum())]] = True
    return kept


def _product(table: TableSpec, rows: Tensor, selections: Tensor, cuts: Sequence[int]) -> Tensor:
    product = rows.clone()
    for (low, high), selection in zip(block_ranges(cuts, table.num_embeddings), selections):
        product[low:high] = (rows[low:high] * selection).to(rows.dtype)
    return product


def _sparse_form(
    tables: Sequence[TableSpec], weights: Mapping[str, Tensor], kept: Mapping[str, Tensor]
) -> MethodState:
    nonzeros = {table.name: int(kept[table.name].sum()) for table in tables}
    tensors, pointers, columns = {}, [], []
    for table in tables:
        mask = kept[table.name]
        if nonzeros[table.name]:
            tensors[f"rows.{table.name}"] = weights[table.name][mask].unsqueeze(1)
            counts = torch.zeros(table.num_embeddings + 1, dtype=torch.int64)
            counts[1:] = mask.sum(1)
            pointers.append(counts.cumsum(0))
            columns.append(mask.nonzero()[:, 1])
    tensors["route.pointers"] = torch.cat(pointers).to(pointer_dtype(list(nonzeros.values())))
    tensors["route.columns"] = torch.cat(columns).to(column_dtype(tables))
    return MethodState(config=Sparse(nonzeros=nonzeros), tensors=tensors)


def _pointer_itemsize(tables: Sequence[TableSpec]) -> int:
    return pointer_dtype([t.num_embeddings * t.embedding_dim for t in tables]).itemsize
