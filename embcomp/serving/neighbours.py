"""The embeddings of an artefact's ids, and which of them are near each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp.errors import DataError
from embcomp.serving.id_lookup import SingleIds
from embcomp.serving.modules import ServingEmbeddingBagCollection, ServingEmbeddingCollection
from embcomp.tables.specs import TableSpec

Tables = ServingEmbeddingBagCollection | ServingEmbeddingCollection

NO_DIRECTION = 1e-12  # embeddings whose norm is no larger are taken for zero

_CHUNK = 1 << 16  # ids that are looked up together


def embeddings(serving: Tables, table: TableSpec) -> Tensor:
    """(num_embeddings, embedding_dim) float32 embeddings of all ids of a table, on the CPU.

    Args:
        serving: tables that were loaded with `rows="torch"`.
        table: one of them.
    """
    index = next(n for n, group in enumerate(serving.groups) if table in group.tables)
    instances = serving.groups[index].instances
    own = next(n for n, instance in enumerate(instances) if instance.table == table)
    start = sum(instance.table.embedding_dim for instance in instances[:own])
    single = SingleIds(serving)
    parts = []
    for first in range(0, table.num_embeddings, _CHUNK):
        last = min(first + _CHUNK, table.num_embeddings)
        ids = torch.zeros(len(instances), last - first, dtype=torch.int64, device=serving.device)
        ids[own] = torch.arange(first, last)
        parts.append(single(index, ids)[:, start : start + table.embedding_dim].cpu())
    return torch.cat(parts)


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
    rows = embeddings(serving, table).double()
    own = rows[id_]
    if not float(own.norm()) > NO_DIRECTION:
        raise DataError(f"the embedding of id {id_} of table {table.name!r} is zero: no direction")
    norms = rows.norm(dim=1)
    cosines = torch.where(
        norms > NO_DIRECTION, rows @ own / (norms * own.norm()).clamp(min=NO_DIRECTION), -math.inf
    )
    cosines[id_] = -math.inf
    order = torch.argsort(cosines, descending=True, stable=True)[:count]
    return [
        Neighbour(id=int(i), cosine=float(cosines[i]), distance=float((rows[i] - own).norm()))
        for i in order
        if math.isfinite(float(cosines[i]))
    ]
