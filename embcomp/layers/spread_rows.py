"""A few rows from all over a table, cheap to read: which they are follows from its length alone."""

from __future__ import annotations

import torch
from torch import Tensor

from embcomp.layers.row_sources import RowSource

RUN = 64
"""Rows of a sample that follow each other."""


def spread_ids(count: int, most: int) -> Tensor:
    """At most so many of the ids below `count`, spread evenly, rising."""
    if count <= most:
        return torch.arange(count)
    return (torch.arange(most, dtype=torch.float64) * count / most).long()


def spread_runs(count: int, most: int) -> Tensor:
    """About so many ids in runs of 64 that are spread evenly, rising; all where there are no more."""
    if count <= most or most < RUN:
        return spread_ids(count, most)
    starts = spread_ids(count - RUN + 1, most // RUN)
    ids = (starts[:, None] + torch.arange(RUN)).flatten()
    return torch.unique(ids)  # runs overlap where the table is hardly longer than the sample


def read_spread(source: RowSource, ids: Tensor) -> Tensor:
    """The rows of `spread_runs` or `spread_ids`, read together where they follow each other."""
    breaks = (ids.diff() != 1).nonzero()[:, 0] + 1
    runs = torch.tensor_split(ids, breaks)
    return torch.cat([source.read(int(run[0]), int(run[-1]) + 1) for run in runs])
