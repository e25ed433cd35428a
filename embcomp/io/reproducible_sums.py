"""Sums whose bits depend on the numbers alone, not on a library, its version or its threads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pairwise_sum(values: NDArray[np.float64]) -> float:
    """Add pairs of (n,) numbers until one is left; 0 of none."""
    while len(values) > 1:
        half = len(values) // 2
        values = np.append(values[:half] + values[half : 2 * half], values[2 * half :])
    return float(values[0]) if len(values) else 0.0


def to_digits(figure: float, digits: int = 12) -> float:
    """Round to significant digits, behind which sums in another order may differ."""
    return float(f"{figure:.{digits}g}")
