"""Which of the sizes within a budget quantise the tables that were trained best, measured on them.

No law knows beforehand whether a table's rows are alike, nearly of low rank, or neither, and which size
is best differs with that. Trained, they can be asked: each size's clustering is tried on a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from embcomp.backends.codebooks.clustering import Latents, find_scales
from embcomp.backends.codebooks.expected_error import NOT_REGAINED
from embcomp.backends.codebooks.kmeans import Clustering, kmeans
from embcomp.backends.codebooks.row_samples import sample_rows
from embcomp.backends.codebooks.subvectors import SubvectorLayout
from embcomp.layers.block_work import IN_MEMORY, Work
from embcomp.layers.row_sources import MemoryRows, RowSource
from embcomp.tables.budget import format_bytes
from embcomp.tables.specs import TableSpec

ROWS_MEASURED = 1 << 15
"""Of each table, at the most."""
_BOOKS_MEASURED = 4  # codebooks of each table, or of each group that shares
_POINTS_PER_CENTROID = 64
_ITERATIONS = 10


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of a method that ends in codes.

    Args:
        subvector_dim: width of a sub-vector.
        num_codewords: codewords in a codebook.
        latent_dim: numbers of a codeword.
        bytes: what the tables take in it.
        error: measured, as a share of the rows' variance; NaN before that.
    """

    subvector_dim: int
    num_codewords: int
    latent_dim: int
    bytes: int
    error: float = math.nan


@dataclass(frozen=True, kw_only=True)
class SizeChoice:
    """All sizes that were measured."""

    sizes: tuple[Size, ...]

    @property
    def best(self) -> Size:
        """The size that loses least; of equals the smallest."""
        return min(self.sizes, key=lambda size: (size.error, size.bytes, size.latent_dim))

    def document(self) -> dict[str, Any]:
        """For a run's records."""
        best = self.best
        return {
            "subvector_dim": best.subvector_dim,
            "num_codewords": best.num_codewords,
            "latent_dim": best.latent_dim,
            "bytes": best.bytes,
            "error": best.error,
            "measured": [vars(size) for size in self.sizes],
        }

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{each.num_codewords} codewords of {each.latent_dim} for every {each.subvector_dim} "
            f"numbers: {each.error:.2%} of the variance lost, {format_bytes(each.bytes)}"
            f"{' (chosen)' if each == self.best else ''}"
            for each in sorted(self.sizes, key=lambda size: size.error)
        ]


@dataclass(frozen=True, kw_only=True)
class TrainedSample:
    """Rows of trained tables on which sizes are measured.

    Args:
        tables: the group.
        rows: (n, embedding_dim) of each table.
        weights: (n,) of each table.
    """

    tables: Sequence[TableSpec]
    rows: Sequence[Tensor]
    weights: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        tables: Sequence[TableSpec],
        rows: Mapping[str, RowSource],
        weights: Mapping[str, RowSource],
        *,
        seed: int,
        work: Work = IN_MEMORY,
    ) -> TrainedSample:
        """Draw a sample of each table.

        Args:
            tables: the group.
            rows: by table, (N, embedding_dim).
            weights: by table, (N,).
            seed: of what is drawn.
            work: looks at every block.
        """
        drawn, masses = [], []
        for table in tables:
            own, name = table.name, f"measured-{table.name}"
            some = sample_rows(
                name, {own: weights[own]}, table.embedding_dim, ROWS_MEASURED, seed, work
            )
            drawn.append(some.gather(f"{name}-rows", rows[own], own, work).whole().float())
            masses.append(some.weights[own])
        return cls(tables=tables, rows=drawn, weights=masses)

    def error(
        self,
        layout: SubvectorLayout,
        *,
        latent: int,
        codewords: int,
        scaled: bool,
        seed: int,
        backend: Clustering = "torch",
    ) -> float:
        """The share of the rows' variance that a size is measured to lose.

        Of what latents leave out a part counts, as further training regains the rest.

        Args:
            layout: the tables' sub-vectors.
            latent: numbers of a codeword.
            codewords: in a codebook.
            scaled: whether tables have factors of their own.
            seed: of the clusterings.
            backend: what runs k-means.
        """
        cuts = [layout.cut(own) for own in self.rows]
        scales = find_scales(self._latents(layout, cuts), scaled=scaled)
        lost = whole = 0.0
        first = 0
        for _, count in layout.units:
            places = torch.linspace(0, count - 1, min(count, _BOOKS_MEASURED)).round().long()
            for place in places.tolist():
                points, masses = self._members(layout, first + place, cuts, scales)
                points, left_out = _projected(points, masses, latent)
                found = kmeans(
                    points,
                    masses,
                    codewords,
                    seed=seed,
                    backend=backend,
                    iterations=_ITERATIONS,
                    points_per_centroid=_POINTS_PER_CENTROID,
                )
                each = count / len(places)
                mass = float(masses.sum())
                within = float((masses * points.double().square().sum(1)).sum())
                lost += each * (found.errors[-1] * mass + NOT_REGAINED * left_out)
                whole += each * (within + left_out)
            first += count
        return lost / whole if whole > 0 else 0.0

    def _latents(self, layout: SubvectorLayout, cuts: Sequence[Tensor]) -> Latents:
        names = [table.name for table in self.tables]
        short = [replace(t, num_embeddings=len(own)) for t, own in zip(self.tables, cuts)]
        return Latents(
            layout=replace(layout, tables=short),
            rows={name: MemoryRows(own) for name, own in zip(names, cuts)},
            weights={name: MemoryRows(own) for name, own in zip(names, self.weights)},
        )

    def _members(
        self,
        layout: SubvectorLayout,
        shared: int,
        cuts: Sequence[Tensor],
        scales: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        """What shares a codebook (n, w), without the tables' scales, and its weights (n,)."""
        points, masses = [], []
        for n in range(len(self.tables)):
            for position, owner in enumerate(layout.shared_by(n)):
                if owner == shared:
                    points.append(cuts[n][:, position] / scales[n])
                    masses.append(self.weights[n])
        return torch.cat(points), torch.cat(masses)


def choose_size(sizes: Sequence[Size], error: Callable[[Size], float]) -> SizeChoice:
    """Measure sizes.

    Args:
        sizes: within the budget; their errors are not known yet.
        error: measures one.
    """
    return SizeChoice(sizes=tuple(replace(size, error=error(size)) for size in sizes))


def _projected(points: Tensor, masses: Tensor, latent: int) -> tuple[Tensor, float]:
    """Points along their first axes, (n, latent), and the weighted squares that are left out."""
    if latent >= points.shape[1]:
        return points, 0.0
    wide = points.double()
    seconds = (wide * masses[:, None]).t() @ wide
    values, vectors = torch.linalg.eigh(seconds)
    return points @ vectors[:, -latent:].float(), float(values[:-latent].clamp(min=0).sum())
