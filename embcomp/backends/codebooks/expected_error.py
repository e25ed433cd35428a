"""What codes are expected to lose of a table, before anything is trained.

Rows are taken to be Gaussian with variances that fall as `axis ** -1.5` along axes of any direction, as
those of trained tables were found to (`benchmarks/quantisation_budget.py`). A sub-vector sees the first
of these axes, and what lies beyond its own width evenly in all of its directions: the narrower, the
more alike its directions. What `k` codewords lose of it is Zador's law, `kappa(d) * d * (product of
variances) ** (1 / d) * k ** (-2 / d)` with a fit of kappa, over as many axes as pay; those left out
lose their variance. Rows are what codewords were fitted to, so that few rows for each lose less.

Three facts of the best codewords are made to hold for the figures too, whatever the fits: more codewords
lose no more, sub-vectors that are narrower lose no more (two halves have their own codes for what was
one), and wider latents lose no more (their further axes may be left alone).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

NOT_REGAINED = 1 / 3
"""The share of what narrow latents leave out that further training is taken to leave."""

_FALL = 1.5
_CROWDING = 2  # the power of the share of rows beyond one for each codeword


@dataclass(frozen=True, kw_only=True)
class Points:
    """The sub-vectors that share a codebook.

    Args:
        dim: columns of the rows that they were cut from.
        kinds: how many tables or positions they come from, each with directions of its own.
        count: how many they are.
    """

    dim: int
    kinds: int
    count: int


def expected_error(points: Points, *, width: int, latent: int, codewords: int) -> float:
    """The share of the variance that is lost, in [0, 1].

    It never rises with `codewords` or `latent`, and never falls with `width`.

    Args:
        points: what is stored as codes.
        width: of a sub-vector.
        latent: numbers of a codeword, at most `width`, that a projection widens.
        codewords: in the codebook.
    """
    width = min(width, points.dim)
    return _errors(points, codewords)[width - 1][min(latent, width) - 1]


@lru_cache(maxsize=1 << 12)
def _errors(points: Points, codewords: int) -> tuple[tuple[float, ...], ...]:
    """By width and latent, both from 1: the least over all that are wider, and all narrower latents."""
    crowding = max(0.0, 1 - codewords / points.count) ** _CROWDING
    apart = max(1.0, codewords / points.kinds)
    rows: list[tuple[float, ...]] = [(1.0,) * points.dim]
    for width in range(points.dim, 0, -1):
        together = _prefixes(points.dim, points.kinds, width, float(codewords))
        each = _prefixes(points.dim, 1, width, apart)
        least, row = 1.0, list[float]()
        for (within, lost), (own, own_lost), wider in zip(together, each, rows[-1]):
            whole = len(row) == width - 1  # a latent as wide as the sub-vector leaves nothing out
            one = lost * crowding + NOT_REGAINED * (0.0 if whole else max(0.0, 1 - within))
            other = own_lost * crowding + NOT_REGAINED * (0.0 if whole else max(0.0, 1 - own))
            least = min(least, one, other)
            row.append(min(least, wider, rows[-1][-1]) if whole else min(least, wider))
        rows.append(tuple(row))
    return tuple(rows[:0:-1])


@lru_cache(maxsize=1 << 14)
def _prefixes(
    dim: int, kinds: int, width: int, codewords: float
) -> tuple[tuple[float, float], ...]:
    """For each number of first axes, the share of variance along them, and what codewords lose of it.

    Args:
        dim: columns of whole rows.
        kinds: so many spectra lie in directions that have nothing to do with each other.
        width: columns of the sub-vector.
        codewords: for all of them.
    """
    within = logarithms = 0.0
    gain = 0.0  # what codes save at most of the variance along the axes so far
    found = []
    for axes, variance in enumerate(_variances(dim, kinds, width), 1):
        within += variance
        logarithms += math.log(variance)
        level = math.exp(logarithms / axes) * codewords ** (-2 / axes)
        if level <= variance:  # else an axis varies less than what would be lost of each
            gain = max(gain, within - _kappa(axes, codewords) * axes * level)
        found.append((within, within - gain))
    return tuple(found)


@lru_cache(maxsize=1 << 12)
def _variances(dim: int, kinds: int, width: int) -> tuple[float, ...]:
    """The shares of a sub-vector's variance along its axes, falling; they sum to 1."""
    falling = [axis**-_FALL for axis in range(1, dim + 1)]
    whole = sum(falling)
    spread = [value / kinds for value in falling for _ in range(min(kinds, width))][:width]
    beyond = (whole - sum(spread)) / width
    return tuple((value + beyond) / whole for value in spread)


def _kappa(axes: int, codewords: float) -> float:
    """A fit of Zador's constants; on a single axis, of the quantisers of Lloyd and Max."""
    few = 0.736 * (codewords / 2) ** -0.6 if axes == 1 and codewords >= 2 else 0.0
    return 1 + 1.72 * axes**-0.73 * (1 - few)
