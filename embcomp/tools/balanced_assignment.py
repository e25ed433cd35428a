"""Points to the nearest centroids that have room."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 1 << 12  # points whose distances are in memory together
_ROUNDS = 20


def assign_balanced(points: Tensor, centroids: Tensor, capacity: int) -> Tensor:
    """Give every point a centroid, none of them more than it has room for.

    In each round every point that has none asks the nearest centroid with room, which takes the nearest of
    those that ask. What is left after some rounds goes where room is, in the order of the points.

    Args:
        points: (N, d) float32.
        centroids: (k, d) float32.
        capacity: points that a centroid has room for; `k * capacity >= N`.

    Returns:
        (N,) int64.
    """
    assert len(centroids) * capacity >= len(points), "there is room for all"
    found = torch.full((len(points),), -1)
    room = torch.full((len(centroids),), capacity)
    left = torch.arange(len(points))
    for _ in range(_ROUNDS):
        if not len(left):
            return found
        wanted, distance = _nearest_with_room(points[left], centroids, room)
        order = torch.argsort(distance, stable=True)
        order = order[torch.argsort(wanted[order], stable=True)]
        asked = torch.bincount(wanted, minlength=len(centroids))
        firsts = asked.cumsum(0) - asked
        place = torch.arange(len(order)) - firsts[wanted[order]]
        taken = order[place < room[wanted[order]]]
        found[left[taken]] = wanted[taken]
        room -= torch.bincount(wanted[taken], minlength=len(centroids))
        left = (found < 0).nonzero()[:, 0]
    found[left] = torch.arange(len(centroids)).repeat_interleave(room)[: len(left)]
    return found


def _nearest_with_room(points: Tensor, centroids: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    open_ = (room > 0).nonzero()[:, 0]
    wanted, distances = [], []
    for part in points.split(_AT_ONCE):
        nearest = torch.cdist(part, centroids[open_]).min(dim=1)
        wanted.append(open_[nearest.indices])
        distances.append(nearest.values)
    return torch.cat(wanted), torch.cat(distances)
