"""Weights of rows: what they may be, what they are called when stored, and their sums."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from embcomp.errors import DataError
from embcomp.io.reproducible_sums import pairwise_sum

WEIGHT_COLUMN = "sample_weight"
"""The prepared column of weights: (n,) float32, finite and at least 0."""
EXPECTED = "a finite number of 0 or more in every row (0 leaves a row out)"
LARGEST = float(np.finfo(np.float32).max)
_CLOSE = 1e-9
"""By how much a sum in another order may differ, as a share of it."""


def are_weights(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Say which of (n,) numbers can be stored as weights: no NaN, and no positive one that is 0 in float32."""
    in_range = (values >= 0) & (values <= LARGEST)
    stored = np.where(in_range, values, 0).astype(np.float32)
    return in_range & ((stored > 0) == (values > 0))


def sum_of(weights: NDArray[np.float32]) -> float:
    """Add up (n,) weights in float64, with the same bits from any library."""
    return pairwise_sum(weights.astype(np.float64))


def are_equal(stated: float | None, summed: float) -> bool:
    """Whether a sum of weights is the stated one, but for the order in which it was made."""
    return stated is not None and math.isclose(stated, summed, rel_tol=_CLOSE)


def check_sums(column: str, rows: Mapping[str, int], sums: Mapping[str, float]) -> None:
    """Raise a DataError when all rows of a split have the weight 0.

    Args:
        column: the raw column of weights.
        rows: of each split.
        sums: of the weights of each split.
    """
    for split, count in rows.items():
        if count and not sums[split] > 0:
            raise DataError(
                f"all {count:,} rows of the {split} split have the weight 0 (column {column!r}), so "
                f"that it has no weighted mean; give some of them a weight, split the rows "
                f"otherwise, or prepare without weights"
            )
