"""Figures of all ids of a table, gathered from blocks of their embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp.serving.neighbours import NO_DIRECTION, Tables, embedding_blocks
from embcomp.tables.specs import TableSpec


@dataclass(frozen=True, kw_only=True)
class IdStatistics:
    """What a table's embeddings are like.

    Attributes:
        width: columns that are not zero for every id.
        mean_width: columns of an id that are not zero, averaged by traffic (over ids without any).
        dead: ids whose embedding is zero.
        norm: mean, smallest and largest L2 norm of an embedding that is not zero; zeros without any.
    """

    width: int
    mean_width: float
    dead: int
    norm: tuple[float, float, float]

    @classmethod
    def of(cls, serving: Tables, table: TableSpec, traffic: Tensor | None) -> IdStatistics:
        """Look up every id of a table once.

        Args:
            serving: tables that were loaded with `rows="torch"`.
            table: one of them.
            traffic: (num_embeddings,) how often its ids occur; None where nobody counted.
        """
        used = torch.zeros(table.embedding_dim, dtype=torch.bool)
        columns = weighted = mass = total = 0.0
        alive, least, most = 0, math.inf, 0.0
        for start, rows in embedding_blocks(serving, table):
            is_set, norms = rows != 0, rows.norm(dim=1).double()
            used |= is_set.any(dim=0)
            own = is_set.sum(dim=1).double()
            columns += float(own.sum())
            if traffic is not None:
                seen = traffic[start : start + len(rows)].double()
                weighted, mass = weighted + float(own @ seen), mass + float(seen.sum())
            norms = norms[norms > NO_DIRECTION]
            if len(norms):
                alive, total = alive + len(norms), total + float(norms.sum())
                least, most = min(least, float(norms.min())), max(most, float(norms.max()))
        return cls(
            width=int(used.sum()),
            mean_width=weighted / mass if mass else columns / table.num_embeddings,
            dead=table.num_embeddings - alive,
            norm=(total / alive, least, most) if alive else (0.0, 0.0, 0.0),
        )
