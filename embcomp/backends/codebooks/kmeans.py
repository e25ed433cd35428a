"""Weighted k-means.

Seeds are drawn as by Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA
2007, and refined by Lloyd's iterations, first on a few points a centroid and then on more: most of the
way costs little so. Centroids move further than to the mean of their points, which takes fewer
iterations (overrelaxed, as in Salakhutdinov and Roweis, "Adaptive Overrelaxed Bound Optimization
Methods", ICML 2003), and only to it at the end and where the error would not fall otherwise. At most
256 points per centroid take part by default; they are drawn by priority sampling (Duffield, Lund,
Thorup, 2007), which keeps heavy points and gives light ones the weight of those that were left out. The
same seed gives the same centroids.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from embcomp.backends.codebooks.nearest import nearest
from embcomp.errors import ConfigError

Clustering = Literal["torch", "faiss"]
"""What runs k-means; faiss must be installed for its own."""

POINTS_PER_CENTROID = 256
_FIRST_LEVELS = (16, 64)  # points per centroid; on the first seeds are drawn
_MOST_SEEDS = 4096  # beyond, seeds are a weighted sample: drawing them one by one takes too long
_MULTIPLIER = 0x2545F4914F6CDD1D  # of Marsaglia's and Vigna's xorshift64*
_ENOUGH = 4e-3  # the share of the error that an iteration must gain for another one
_RELAXATION = 1.8  # of the way to the mean; below 2, where the error may rise again


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
        iterations: at most so many of Lloyd's; they end when the error hardly falls.
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
        points = points.unique(dim=0)  # in order of value
        last = points[-1:].expand(count - len(points), -1)
        return Clusters(centroids=torch.cat([points, last]), errors=(0.0,))
    if backend == "faiss":
        return _faiss(points, weights, count, seed=seed, iterations=iterations)
    whole = _Points(points, weights)
    if count > _MOST_SEEDS:
        return _lloyd(whole, _sample(points, weights, count, random)[0], iterations)
    centroids = None
    for each in _FIRST_LEVELS:
        few = _Points(*_sample(points, weights, each * count, random))
        if centroids is None:
            centroids = few.seeds(count, random)
        if len(few) == len(points):
            break
        centroids = _lloyd(few, centroids, iterations).centroids
    assert centroids is not None
    return _lloyd(whole, centroids, iterations)


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
    """Equal points made one, in the order in which they come first.

    So what is drawn of them does not turn on their last bits, which other ranks round in another way.
    """
    points = points + 0.0  # makes the two zeros one
    keys = torch.zeros(len(points), dtype=torch.int64)
    for bits in points.view(torch.int32).unbind(1):
        keys = keys.mul_(_MULTIPLIER).add_(bits)  # hashes, to sort numbers and not rows
    distinct, inverse = keys.unique(return_inverse=True)
    if len(distinct) == len(points):
        return points, weights
    places = torch.arange(len(points))
    first = torch.full_like(distinct, len(points)).scatter_reduce(0, inverse, places, "amin")
    first, order = first.sort()
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))[inverse]
    some = points[first]
    if not torch.equal(some[inverse], points):  # different points of one hash
        some, inverse = points.unique(dim=0, return_inverse=True)
    return some, weights.new_zeros(len(some)).index_add_(0, inverse, weights)


class _Points:
    """Weighted points, laid out for many passes over them.

    Args:
        points: (n, d) float32.
        weights: (n,) float64.
    """

    def __init__(self, points: Tensor, weights: Tensor) -> None:
        self.points, self._weights = points, weights
        self._axes = points.t().contiguous()  # (d, n)
        self._weighted = self._axes * weights  # (d, n) float64

    def __len__(self) -> int:
        return len(self.points)

    def seeds(self, count: int, random: torch.Generator) -> Tensor:
        """Points that are far from each other: (count, d)."""
        # In numpy: many steps on few points, which take less than torch needs to dispatch them.
        draws = torch.rand(count, generator=random, dtype=torch.float64).numpy()
        axes, weights = self._axes.numpy(), self._weights.numpy()
        chosen = np.empty(count, dtype=np.int64)
        distances = np.full(len(self), np.inf, dtype=np.float32)
        for n, draw in enumerate(draws):
            ends = (weights if n == 0 else weights * distances).cumsum()
            chosen[n] = min(ends.searchsorted(draw * ends[-1], side="right"), len(self) - 1)
            gaps = axes - axes[:, chosen[n], None]
            np.minimum(distances, np.square(gaps, out=gaps).sum(0), out=distances)
        return self.points[torch.from_numpy(chosen)]

    def assign(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Each point's centroid (n,) and its squared distance (n,)."""
        only = torch.zeros(1, dtype=torch.int64)
        codes = nearest(self.points.unsqueeze(1), centroids.unsqueeze(0), only)[:, 0]
        gaps = self._axes - centroids.t().contiguous().index_select(1, codes)
        return codes, gaps.square_().sum(0)

    def mean(self, distances: Tensor) -> float:
        """The weighted mean of (n,) distances."""
        return float((self._weights * distances).sum() / self._weights.sum())

    def means(self, codes: Tensor, distances: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Weighted means of the centroids' points, and which have none: these fit worst so far."""
        mass = torch.bincount(codes, self._weights, count)
        sums = torch.stack([torch.bincount(codes, axis, count) for axis in self._weighted], dim=1)
        means = (sums / mass.clamp(min=1e-300).unsqueeze(1)).float()
        empty = (mass == 0).nonzero().squeeze(1)
        if len(empty):
            worst = (self._weights * distances).sort(descending=True, stable=True).indices
            means[empty] = self.points[worst[: len(empty)]]
        return means, empty


def _lloyd(points: _Points, centroids: Tensor, iterations: int) -> Clusters:
    """Move centroids until an iteration gains little, and then to the means of their points."""
    codes, distances = points.assign(centroids)
    errors = [points.mean(distances)]
    for left in reversed(range(iterations)):
        means, empty = points.means(codes, distances, len(centroids))
        gains = len(errors) == 1 or errors[-1] < errors[-2] * (1 - _ENOUGH)
        beyond = centroids + _RELAXATION * (means - centroids)
        beyond[empty] = means[empty]
        for moved in (beyond, means) if gains and left else (means,):
            codes, distances = points.assign(moved)
            error = points.mean(distances)
            if error < errors[-1]:
                break
        else:
            break  # what is left is rounding
        centroids = moved
        errors.append(error)
        if not gains:
            break
    return Clusters(centroids=centroids, errors=tuple(errors))


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
    whole = _Points(points, weights)
    error = whole.mean(whole.assign(centroids)[1])
    return Clusters(centroids=centroids, errors=(error,))
