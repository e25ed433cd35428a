"""The embeddings of an artefact's ids, and which of them are near each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp.errors import DataError
from embcomp.serving.id_lookup import SingleIds
from embcomp.serving.modules import ServingEmbeddingBagCollection, ServingEmbeddingCollection
from embcomp.tables.specs import TableSpec

Tables = ServingEmbeddingBagCollection | ServingEmbeddingCollection

NO_DIRECTION = 1e-12  # embeddings whose norm is no larger are taken for zero

_AT_ONCE = 2 << 20  # bytes of the embeddings that are looked up together, those of other tables too


def embeddings(serving: Tables, table: TableSpec) -> Tensor:
    """(num_embeddings, embedding_dim) float32 embeddings of all ids of a table, on the CPU.

    Args:
        serving: tables that were loaded with `rows="torch"`.
        table: one of them, that may be held whole.
    """
    return torch.cat([rows for _, rows in embedding_blocks(serving, table)])


def embedding_blocks(
    serving: Tables, table: TableSpec, *, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The first id and the float32 embeddings of each block of a table's ids, on the CPU.

    Args:
        serving: tables that were loaded with `rows="torch"`.
        table: one of them.
        start: the first id.
        stop: the one after the last; all by default.
    """
    index = next(n for n, group in enumerate(serving.groups) if table in group.tables)
    instances = serving.groups[index].instances
    own = next(n for n, instance in enumerate(instances) if instance.table == table)
    column = sum(instance.table.embedding_dim for instance in instances[:own])
    single = SingleIds(serving)
    end = table.num_embeddings if stop is None else stop
    size = max(256, _AT_ONCE // (4 * sum(each.table.embedding_dim for each in instances)))
    for first in range(start, end, size):
        last = min(first + size, end)
        ids = torch.zeros(len(instances), last - first, dtype=torch.int64, device=serving.device)
        ids[own] = torch.arange(first, last)
        yield first, single(index, ids)[:, column : column + table.embedding_dim].cpu()


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """An id whose embedding points in nearly the same direction.

    Attributes:
        id: it.
        cosine: of the angle between both embeddings.
        distance: between both embeddings.
    """

    id: int
    cosine: float
    distance: float


def nearest(serving: Tables, table: TableSpec, id_: int, count: int) -> list[Neighbour]:
    """The ids with the nearest embeddings by cosine; of equals, the lower id comes first.

    Args:
        serving: loaded tables.
        table: one of its tables.
        id_: an id of it.
        count: how many.

    Raises:
        DataError: the id is not in the table, or its embedding is zero.
    """
    if not 0 <= id_ < table.num_embeddings:
        raise DataError(f"table {table.name!r} has ids in [0, {table.num_embeddings}); got {id_}")
    own = next(embedding_blocks(serving, table, start=id_, stop=id_ + 1))[1][0].double()
    if not float(own.norm()) > NO_DIRECTION:
        raise DataError(f"the embedding of id {id_} of table {table.name!r} is zero: no direction")
    best: list[Neighbour] = []
    for start, block in embedding_blocks(serving, table):
        best += _nearest_of(block.double(), start, own, id_, count)
        best = sorted(best, key=lambda each: (-each.cosine, each.id))[:count]
    return best


def _nearest_of(rows: Tensor, start: int, own: Tensor, id_: int, count: int) -> list[Neighbour]:
    """The nearest among a block's rows, of which the first is that of the id `start`."""
    norms = rows.norm(dim=1)
    cosines = torch.where(
        norms > NO_DIRECTION, rows @ own / (norms * own.norm()).clamp(min=NO_DIRECTION), -math.inf
    )
    if start <= id_ < start + len(rows):
        cosines[id_ - start] = -math.inf
    order = torch.argsort(cosines, descending=True, stable=True)[:count]
    return [
        Neighbour(
            id=start + int(i), cosine=float(cosines[i]), distance=float((rows[i] - own).norm())
        )
        for i in order
        if math.isfinite(float(cosines[i]))
    ]
