"""Blocks of ids by frequency: where ids are ranked by it, a block is a range of ids."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from embcomp.errors import ConfigError

TRAFFIC_QUANTILES = (0.5, 0.8, 0.9, 0.97, 0.995)
"""Shares of all look-ups below which blocks end: every block sees enough of them to learn."""

_AT_ONCE = 1 << 20  # counts that are summed at a time
_EULER_GAMMA = 0.5772156649015329


def traffic_cuts(
    num_embeddings: int,
    counts: Tensor | None = None,
    quantiles: Sequence[float] = TRAFFIC_QUANTILES,
) -> tuple[int, ...]:
    """The first ids of all blocks but the first.

    Args:
        num_embeddings: ids run over `[0, num_embeddings)`, the most frequent first.
        counts: (num_embeddings,) how often each occurs. Where nobody counted (None, empty, or all
            zero) the id of rank r is taken to occur in proportion to 1 / r, as Zipf has it.
        quantiles: shares of all occurrences, rising, in (0, 1).

    Returns:
        Rising ids in `[1, num_embeddings)`, at most one for each quantile.
    """
    if counts is None or not counts.numel() or not bool(counts.any()):
        harmonic = math.log(num_embeddings) + _EULER_GAMMA
        ends = [round(math.exp(share * harmonic - _EULER_GAMMA)) for share in quantiles]
    else:
        # In float64: counts are exact there, and so is where a share of them is reached.
        shares = torch.tensor(list(quantiles), dtype=torch.float64) * float(counts.sum())
        ends = _where_reached(counts, shares)
    return tuple(sorted({end for end in ends if 0 < end < num_embeddings}))


def _where_reached(counts: Tensor, shares: Tensor) -> list[int]:
    """How many ids it takes until counts add up to each share; a part of them is summed at a time."""
    ends = [len(counts) + 1] * len(shares)
    so_far = 0.0
    for start in range(0, len(counts), _AT_ONCE):
        reached = counts[start : start + _AT_ONCE].to(torch.float64).cumsum(0) + so_far
        found = torch.searchsorted(reached, shares)
        for n, place in enumerate(found.tolist()):
            if place < len(reached) and ends[n] > len(counts):
                ends[n] = start + place + 1
        so_far = float(reached[-1])
    return ends


def block_ranges(cuts: Sequence[int], num_embeddings: int) -> list[tuple[int, int]]:
    """The blocks that cuts make: first id, and the one after the last."""
    bounds = [0, *cuts, num_embeddings]
    return list(itertools.pairwise(bounds))


def check_cuts(method: str, table: str, cuts: Sequence[int], num_embeddings: int | None) -> None:
    """Raise a ConfigError unless cuts rise within a table (of any length where it is None)."""
    rising = all(low < high for low, high in itertools.pairwise(cuts))
    inside = not cuts or (cuts[0] > 0 and (num_embeddings is None or cuts[-1] < num_embeddings))
    if not (rising and inside):
        end = "its rows" if num_embeddings is None else f"its {num_embeddings} rows"
        raise ConfigError(
            f"{method}: cuts of table {table!r} must rise strictly from at least 1 to less than "
            f"{end}, got {list(cuts)}"
        )
