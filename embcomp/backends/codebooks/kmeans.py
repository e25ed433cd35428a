"""Weighted k-means.

Seeds are drawn as by Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA
2007, and refined by Lloyd's iterations. At most 256 points per centroid take part by default; they are drawn by
priority sampling (Duffield, Lund, Thorup, 2007), which keeps heavy points and gives light ones the
weight of those that were left out. Ties always go to the lowest index, and the same seed gives the
same centroids.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Literal, get_args

import torch
from torch import Tensor

from embcomp.backends.codebooks.nearest_codeword import nearest_on_a_line
from embcomp.errors import ConfigError

Clustering = Literal["torch", "faiss"]
"""What runs k-means; faiss must be installed for its own."""

POINTS_PER_CENTROID = 256
_POINTS_PER_SEED = 32
_MOST_SEEDS = 4096  # beyond, seeds are a weighted sample: drawing them one by one takes too long
_AT_ONCE = 1 << 17  # distances held at a time: they stay in a core's cache


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """What k-means found.

    Args:
        centroids: (k, d) float32.
        errors: weighted mean squared distance of the points before each iteration and after the
            last; it never rises.
    """

    centroids: Tensor
    errors: tuple[float, ...]


def kmeans(
    points: Tensor,
    weights: Tensor,
    count: int,
    *,
    seed: int,
    iterations: int = 25,
    backend: Clustering = "torch",
    points_per_centroid: int = POINTS_PER_CENTROID,
) -> Clusters:
    """Cluster weighted points.

    Where no more than `count` points are distinct, they are the centroids, in order of value, and
    the last is repeated.

    Args:
        points: (n, d), n at least 1.
        weights: (n,), not negative; points of weight 0 take no part unless all have it.
        count: centroids.
        seed: of all that is drawn.
        iterations: at most so many of Lloyd's; they end when the error falls no more.
        backend: `torch`, or `faiss` where it is installed.
        points_per_centroid: at most so many take part.
    """
    if backend not in get_args(Clustering):
        raise ConfigError(
            f"clustering must be one of {', '.join(get_args(Clustering))}, got {backend!r}"
        )
    random = torch.Generator().manual_seed(seed)
    points, weights = _distinct(*_sample(points, weights, points_per_centroid * count, random))
    if len(points) <= count:
        last = points[-1:].expand(count - len(points), -1)
        return Clusters(centroids=torch.cat([points, last]), errors=(0.0,))
    if backend == "faiss":
        return _faiss(points, weights, count, seed=seed, iterations=iterations)
    return _lloyd(points, weights, _seeds(points, weights, count, random), iterations)


def _sample(
    points: Tensor, weights: Tensor, most: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """At most so many points, and weights that make their sums estimates of the whole's."""
    points, weights = points.detach().float().cpu(), weights.detach().double().cpu()
    weighty = weights > 0
    if not bool(weighty.all()):
        if not bool(weighty.any()):
            weights = torch.ones_like(weights)
        else:
            points, weights = points[weighty], weights[weighty]
    if len(points) <= most:
        return points, weights
    chances = torch.rand(len(points), generator=random, dtype=torch.float64).clamp_(min=1e-300)
    best = (weights / chances).topk(most + 1)
    kept = best.indices[:-1].sort().values
    return points[kept], weights[kept].clamp(min=float(best.values[-1]))


def _distinct(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Equal points made one, in order of value."""
    distinct, inverse = points.unique(dim=0, return_inverse=True)
    return distinct, weights.new_zeros(len(distinct)).index_add_(0, inverse, weights)


def _seeds(points: Tensor, weights: Tensor, count: int, random: torch.Generator) -> Tensor:
    """(count, d) distinct points, far from each other."""
    if count > _MOST_SEEDS:
        return _sample(points, weights, count, random)[0]
    points, weights = _sample(points, weights, _POINTS_PER_SEED * count, random)
    chosen = torch.empty(count, dtype=torch.int64)
    distances = torch.full((len(points),), torch.inf)
    for n in range(count):
        masses = weights if n == 0 else weights * distances
        ends = masses.cumsum(0)
        at = torch.rand((), generator=random, dtype=torch.float64) * ends[-1]
        chosen[n] = torch.searchsorted(ends, at, right=True).clamp_(max=len(points) - 1)
        distances = torch.minimum(distances, (points - points[chosen[n]]).square().sum(1))
    return points[chosen]


def _lloyd(points: Tensor, weights: Tensor, centroids: Tensor, iterations: int) -> Clusters:
    errors: list[float] = []
    codes, distances = _assign(points, centroids)
    for _ in range(iterations):
        errors.append(_mean(weights, distances))
        moved = _means(points, weights, codes, distances, len(centroids))
        new_codes, new_distances = _assign(points, moved)
        if not _mean(weights, new_distances) < errors[-1] * (1 - 1e-6):
            break  # converged: what is left is rounding
        centroids, codes, distances = moved, new_codes, new_distances
    errors.append(_mean(weights, distances))
    return Clusters(centroids=centroids, errors=tuple(errors))


def _assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Each point's centroid (n,) and its squared distance (n,)."""
    if points.shape[1] == 1:
        codes = nearest_on_a_line(points, centroids[None, :, 0], torch.zeros(1).long())[:, 0]
    else:
        codes = _nearest_by_products(points, centroids)
    return codes, (points - centroids[codes]).square().sum(1)


def _nearest_by_products(points: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each point, but a few times faster, and rounded like a matrix product.

    A point between two centroids may go to either, which does not matter while they move.
    """
    centre = centroids.mean(0)
    moved = centroids - centre
    halves = moved.square().sum(1) / 2
    count = len(centroids)
    places = torch.arange(count, dtype=torch.float32)
    found = []
    for rows in points.split(max(1, _AT_ONCE // count)):
        scores = torch.addmm(halves, rows - centre, moved.t(), alpha=-1)
        least = scores.amin(1, keepdim=True)
        found.append(torch.where(scores <= least, places, count - 1.0).amin(1).long())
    return torch.cat(found)


def _mean(weights: Tensor, distances: Tensor) -> float:
    return float((weights * distances).sum() / weights.sum())


def _means(points: Tensor, weights: Tensor, codes: Tensor, distances: Tensor, count: int) -> Tensor:
    """The centroids' weighted means; those without points move to the points that fit worst."""
    mass = weights.new_zeros(count).index_add_(0, codes, weights)
    sums = weights.new_zeros(count, points.shape[1])
    sums.index_add_(0, codes, weights.unsqueeze(1) * points)
    means = (sums / mass.clamp(min=1e-300).unsqueeze(1)).float()
    empty = (mass == 0).nonzero().squeeze(1)
    if len(empty):
        worst = (weights * distances).sort(descending=True, stable=True).indices[: len(empty)]
        means[empty] = points[worst]
    return means


def missing_for(backend: Clustering) -> str | None:
    """What cannot be imported of what runs k-means, and the way out; None where nothing is missing."""
    if backend == "faiss":
        try:
            import_module("faiss")
        except ImportError:
            return (
                "faiss was asked for but cannot be imported; install faiss-cpu, or set "
                "clustering: torch"
            )
    return None


def _faiss(points: Tensor, weights: Tensor, count: int, *, seed: int, iterations: int) -> Clusters:
    missing = missing_for("faiss")
    if missing is not None:
        raise ConfigError(f"clustering: {missing}")
    faiss = import_module("faiss")
    model = faiss.Kmeans(
        points.shape[1],
        count,
        niter=iterations,
        seed=seed % (1 << 31),
        max_points_per_centroid=POINTS_PER_CENTROID,
        min_points_per_centroid=1,
    )
    model.train(points.numpy(), weights=weights.float().numpy())
    centroids = torch.from_numpy(model.centroids.copy())
    return Clusters(centroids=centroids, errors=(_mean(weights, _assign(points, centroids)[1]),))
