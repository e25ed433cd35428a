"""From rows to codebooks and codes: weights of ids, k-means over all who share, the nearest codeword."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp.backends.codebooks.kmeans import Clustering, kmeans
from embcomp.backends.codebooks.nearest import nearest
from embcomp.backends.codebooks.subvectors import SubvectorLayout
from embcomp.layers.hashing import salt
from embcomp.tables.name_hash import name64
from embcomp.tables.specs import TableSpec

FREQUENCY_EXPONENT = 0.5
"""Ids count in clusterings by this power of their frequency: rare rows are mostly noise."""

_ROWS_AT_ONCE = 1 << 16


def id_weights(tables: Sequence[TableSpec], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each id counts: (num_embeddings,) float64 for each table.

    Where nobody counted, ids are taken to be ranked by frequency and to follow Zipf's law.
    """
    found = {}
    for table in tables:
        if table.name in counts:
            frequency = counts[table.name].double()
        else:
            frequency = 1 / torch.arange(1, table.num_embeddings + 1, dtype=torch.float64)
        found[table.name] = frequency**FREQUENCY_EXPONENT
    return found


def share_cold_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows whose ids never occur, made the weighted mean of the others, so that they share codes.

    Args:
        rows: (N, ...) of one table.
        weights: (N,), 0 for what never occurs.
    """
    cold = weights == 0
    if not bool(cold.any()) or bool(cold.all()):
        return rows
    mean = torch.tensordot(weights / weights.sum(), rows.double(), dims=1).to(rows.dtype)
    rows = rows.clone()
    rows[cold] = mean
    return rows


@dataclass(frozen=True, kw_only=True)
class Codebooks:
    """Codewords, and the tables' factors on them.

    Args:
        words: (G, k, w) float32.
        scales: one for each table; 1 where tables have none of their own.
    """

    words: Tensor
    scales: tuple[float, ...]


def find_scales(
    latents: Sequence[Tensor], weights: Sequence[Tensor], *, scaled: bool
) -> tuple[float, ...]:
    """Each table's root mean square over that of all, by weight; ones where not `scaled`.

    Args:
        latents: (N, positions, w) of each table.
        weights: (N,) of each table.
        scaled: whether tables have factors of their own.
    """
    if not scaled:
        return (1.0,) * len(latents)
    squares = [
        float((w * z.double().square().mean((1, 2))).sum()) for z, w in zip(latents, weights)
    ]
    masses = [float(w.sum()) for w in weights]
    whole = sum(squares) / max(sum(masses), 1e-300)
    if not whole > 0:
        return (1.0,) * len(latents)
    return tuple(
        (square / mass / whole) ** 0.5 if square > 0 and mass > 0 else 1.0
        for square, mass in zip(squares, masses)
    )


def cluster(
    layout: SubvectorLayout,
    latents: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    count: int,
    seed: int,
    scaled: bool,
    backend: Clustering = "torch",
    iterations: int = 25,
) -> Codebooks:
    """One codebook for all sub-vectors that share it.

    Args:
        layout: the group's sub-vectors.
        latents: (N, positions, w) of each table.
        weights: (N,) of each table.
        count: codewords in a codebook.
        seed: of the clusterings.
        scaled: whether tables have factors of their own.
        backend: what runs k-means.
        iterations: at most so many in each.
    """
    scales = find_scales(latents, weights, scaled=scaled)
    words = []
    named = [(name64(unit), place) for unit, count in layout.units for place in range(count)]
    for shared, (unit, place) in enumerate(named):
        points, masses = members(layout, shared, latents, weights, scales)
        own = salt(seed, unit, place) >> 1
        found = kmeans(points, masses, count, seed=own, backend=backend, iterations=iterations)
        words.append(found.centroids)
    return Codebooks(words=torch.stack(words), scales=scales)


def members(
    layout: SubvectorLayout,
    shared: int,
    latents: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """All latents of one codebook (n, w), without their tables' scales, and their weights (n,)."""
    points, masses = [], []
    for n, (table, mass) in enumerate(zip(latents, weights)):
        for position, owner in enumerate(layout.shared_by(n)):
            if owner == shared:
                points.append(table[:, position] / scales[n])
                masses.append(mass)
    return torch.cat(points), torch.cat(masses)


def encode(
    layout: SubvectorLayout, latents: Sequence[Tensor], codebooks: Codebooks
) -> Iterator[Tensor]:
    """The codes of all rows, (rows, positions) at a time, table after table.

    Args:
        layout: the group's sub-vectors.
        latents: (N, positions, w) of each table.
        codebooks: of the group.
    """
    for n, table in enumerate(latents):
        which = torch.tensor(layout.shared_by(n))
        for rows in table.split(_ROWS_AT_ONCE):
            yield nearest(rows / codebooks.scales[n], codebooks.words, which)
