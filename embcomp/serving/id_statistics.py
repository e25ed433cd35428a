"""Figures of all ids of a table, gathered from blocks of their embeddings."""

from __future__ import annotations

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
        columns: (ids,) int32 columns of each id that are not zero.
        norms: (ids,) float32 their L2 norms.
    """

    width: int
    columns: Tensor
    norms: Tensor

    @classmethod
    def of(cls, serving: Tables, table: TableSpec) -> IdStatistics:
        """Look up every id of a table once.

        Args:
            serving: tables that were loaded with `rows="torch"`.
            table: one of them.
        """
        used = torch.zeros(table.embedding_dim, dtype=torch.bool)
        columns = torch.empty(table.num_embeddings, dtype=torch.int32)
        norms = torch.empty(table.num_embeddings)
        for start, rows in embedding_blocks(serving, table):
            is_set, own = rows != 0, slice(start, start + len(rows))
            used |= is_set.any(dim=0)
            columns[own] = is_set.sum(dim=1)
            norms[own] = rows.norm(dim=1)
        return cls(width=int(used.sum()), columns=columns, norms=norms)

    @property
    def alive(self) -> Tensor:
        """(ids,) bool, which embeddings are not zero."""
        return self.norms > NO_DIRECTION
