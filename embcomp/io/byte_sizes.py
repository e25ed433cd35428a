"""Sizes in bytes as people write them: a number, or a text with a unit."""

from __future__ import annotations

import re
from fractions import Fraction

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?\s*", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(size: str) -> int | None:
    """The bytes that a text such as `"64MiB"`, `"2GB"`, `"4G"` or `"512"` stands for.

    Args:
        size: a number and perhaps a unit: K, M, G, T are powers of 1000, Ki, Mi, Gi, Ti of 1024, each
            with or without a B, in any case.

    Returns:
        Bytes, rounded down; None for a text that is no size.
    """
    match = _SIZE.fullmatch(size)
    if match is None:
        return None
    unit = _POWERS[(match[2] or "").upper()]
    return int(Fraction(match[1]) * (1024 if match[3] else 1000) ** unit)
