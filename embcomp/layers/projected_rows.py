"""Rows of tables' own widths, each table's through a matrix of its own, zeros behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from embcomp.layers.fused_lookups import FusedEmbedding, PlacedRow
from embcomp.layers.joined_matrices import JoinedColumns, JoinsTables
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.named_parts import part_name


@dataclass(frozen=True, kw_only=True)
class ProjectedTable:
    """What becomes of a table's rows.

    Args:
        name: the table.
        came: columns of a row.
        wanted: columns that a matrix makes of them; as many as came where there is none.
        dim: columns of the embedding; those behind are zeros.
        has_matrix: whether there is one.
        num_features: features that are looked up in the table.
    """

    name: str
    came: int
    wanted: int
    dim: int
    has_matrix: bool
    num_features: int


class ProjectedRows(JoinsTables):
    """Multiplies each table's rows by its matrix; linear, so that bags are pooled before.

    Args:
        tables: in the order of the look-ups.
    """

    def __init__(self, tables: Sequence[ProjectedTable]) -> None:
        super().__init__()
        self._tables = [table for table in tables for _ in range(table.num_features)]
        self._came = [table.came for table in self._tables]
        self._joined = JoinedColumns(self._came, [table.dim for table in self._tables])
        self.projections = nn.ModuleDict(
            {
                part_name("table", table.name): RandomMatrix(table.came, table.wanted)
                for table in tables
                if table.has_matrix
            }
        )

    def fused_embeddings(self, widths: Sequence[int]) -> list[FusedEmbedding]:
        """A row through its matrix, or as it is."""
        return [
            FusedEmbedding(
                rows=[
                    PlacedRow(key=key, projection=matrix if matrix is None else matrix.contiguous())
                ],
                width=table.dim,
            )
            for key, (table, matrix) in enumerate(zip(self._tables, self._matrices()))
        ]

    def _matrices(self) -> list[Tensor | None]:
        """For each (table, feature), the matrix."""
        found: list[Tensor | None] = []
        for table in self._tables:
            if not table.has_matrix:
                found.append(None)
                continue
            weight = self.projections[part_name("table", table.name)].weight
            assert isinstance(weight, Tensor)
            found.append(weight.detach())
        return found

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (B, sum of widths in) -> (B, sum of dims)
        if self.joins(rows):
            return self._joined(rows, self._matrices())
        return torch.cat(self._projected(rows.split(self._came, dim=1)), dim=1)

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        return self._projected(parts)

    def _projected(self, parts: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for part, table in zip(parts, self._tables):
            made = (
                self.projections[part_name("table", table.name)](part) if table.has_matrix else part
            )
            missing = table.dim - table.wanted
            found.append(nn.functional.pad(made, (0, missing)) if missing else made)
        return found


class RandomMatrix(nn.Module):
    """A learnt matrix that keeps the variance of rows, drawn anew wherever it is made.

    Args:
        came: columns of a row.
        wanted: columns that it makes of them.
    """

    def __init__(self, came: int, wanted: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(came, wanted))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal, so scaled that columns have the mean square of those of rows."""
        if self.weight.is_meta:
            return
        came, wanted = self.weight.shape
        nn.init.orthogonal_(self.weight, gain=max(1.0, wanted / came) ** 0.5)

    @override
    def forward(self, rows: Tensor) -> Tensor:  # (B, came) -> (B, wanted)
        return rows @ self.weight
