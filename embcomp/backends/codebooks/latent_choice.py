"""How wide latents should be, guessed from trained full tables before anything else is trained.

With orthonormal projections the squared error of a quantised low-rank table is a sum: what `d` axes
leave out, and what clustering loses within them. The first falls with `d`, the second rises.

The sum itself always favours the full width: the best clusters of whole sub-vectors are never worse
than those of their projections. Narrow latents win only because a low-rank model, trained on, regains
much of what was left out. Nothing measured on the full tables says how much; we count a third of it
(on MovieLens-1M, what a low-rank model still lacked of the full one's AUC was a tenth to a half of
what clustering costs for as much error). The width is the narrowest whose sum is within five per cent
of the least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embcomp.backends.codebooks.clustering import (
    Latents,
    Samples,
    cut_rows,
    find_scales,
    sample_size,
)
from embcomp.backends.codebooks.expected_error import NOT_REGAINED
from embcomp.backends.codebooks.kmeans import Clustering, kmeans
from embcomp.backends.codebooks.low_rank import Moments
from embcomp.backends.codebooks.subvectors import SubvectorLayout
from embcomp.layers.block_work import IN_MEMORY, Work
from embcomp.layers.row_sources import RowSource

TOLERANCE = 1.05
"""A narrower latent is preferred as long as its error is at most this many times the least."""

_POINTS_PER_CENTROID = 64
_ITERATIONS = 10


@dataclass(frozen=True, kw_only=True)
class LatentChoice:
    """What was measured for each width from 1, and the width that follows.

    Args:
        left_out: variance outside the axes, as a share of the whole.
        clustering: what k-means loses within the axes, as a share of the whole.
    """

    left_out: tuple[float, ...]
    clustering: tuple[float, ...]

    @property
    def expected(self) -> list[float]:
        """The error to expect after training, for each width."""
        return [NOT_REGAINED * r + q for r, q in zip(self.left_out, self.clustering)]

    @property
    def latent_dim(self) -> int:
        """The narrowest width that is about as good as the best."""
        enough = TOLERANCE * min(self.expected)
        return 1 + next(n for n, error in enumerate(self.expected) if error <= enough)

    def document(self) -> dict[str, Any]:
        """For a run's records."""
        return {
            "latent_dim": self.latent_dim,
            "left_out": list(self.left_out),
            "clustering": list(self.clustering),
            "expected": self.expected,
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"latent_dim {n}: {r:.2%} of the variance left out, {q:.2%} lost in clusters, "
            f"{e:.2%} expected"
            for n, (r, q, e) in enumerate(zip(self.left_out, self.clustering, self.expected), 1)
        ]
        return [
            *lines,
            f"latent_dim {self.latent_dim}: the narrowest within {TOLERANCE - 1:.0%} of the least",
        ]


def choose_latent_dim(
    layout: SubvectorLayout,
    rows: Mapping[str, RowSource],
    weights: Mapping[str, RowSource],
    *,
    count: int,
    scaled: bool,
    seed: int,
    backend: Clustering = "torch",
    work: Work = IN_MEMORY,
) -> LatentChoice:
    """Measure both errors for every width.

    Args:
        layout: the group's sub-vectors.
        rows: by table, (N, embedding_dim), trained.
        weights: by table, (N,).
        count: codewords in a codebook.
        scaled: whether tables have factors of their own.
        seed: of the clusterings.
        backend: what runs k-means.
        work: does it.
    """
    latents = Latents(
        layout=layout,
        rows={name: cut_rows(layout, own) for name, own in rows.items()},
        weights=weights,
        work=work,
    )
    scales = find_scales(latents, scaled=scaled)
    moments = Moments.of(layout, rows, weights, centred=False, scales=scales, work=work)
    variances, axes = moments.variances(), moments.axes()  # (G, m), (G, m, m)
    shares = moments.masses / moments.masses.sum()
    whole = float((shares * variances.sum(1)).sum()) or 1.0
    left_out = 1 - (shares[:, None] * variances).sum(0).cumsum(0) / whole
    points = sample_size(count, _POINTS_PER_CENTROID)
    samples = Samples.of(latents, scales, points=points, seed=seed)

    def fit(place: tuple[int, int]) -> dict[str, Tensor]:
        shared, width = place
        members, masses = samples.members(shared)
        projected = members @ axes[shared].t().float()  # (n, m), most variance first
        found = kmeans(
            projected[:, :width],
            masses,
            count,
            seed=seed,
            backend=backend,
            iterations=_ITERATIONS,
            points_per_centroid=_POINTS_PER_CENTROID,
        )
        return {"error": torch.tensor(found.errors[-1], dtype=torch.float64)}

    lost = torch.zeros(layout.width, dtype=torch.float64)
    places = [(g, w) for g in range(layout.num_shared) for w in range(1, layout.width + 1)]
    for (shared, width), found in zip(places, work.map("widths", fit, places)):
        lost[width - 1] += shares[shared] * found["error"] / whole
    return LatentChoice(
        left_out=tuple(left_out.clamp(min=0).tolist()), clustering=tuple(lost.tolist())
    )
