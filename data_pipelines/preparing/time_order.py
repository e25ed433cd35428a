"""The k-th smallest of more numbers than fit in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_CHUNK = 1 << 20
_SIGN = np.uint64(1 << 63)


def smallest(path: Path, rank: int) -> float:
    """Return the number of a rank, from 0, among a file's float64; NaN is not allowed.

    It is found digit by digit (16 bits each) by four passes over the file.
    """
    prefix = 0
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, dtype=np.int64)
        values = np.memmap(path, dtype=np.float64, mode="r")
        for start in range(0, len(values), _CHUNK):
            keys = _keys(np.asarray(values[start : start + _CHUNK]))
            if shift < 48:
                keys = keys[keys >> np.uint64(shift + 16) == np.uint64(prefix)]
            digits = (keys >> np.uint64(shift)) & np.uint64(0xFFFF)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        upto = np.cumsum(counts)
        digit = int(np.searchsorted(upto, rank, side="right"))
        rank -= int(upto[digit] - counts[digit])
        prefix = prefix << 16 | digit
    return _value(np.uint64(prefix))


def _keys(values: np.ndarray) -> np.ndarray:
    """Return (n,) uint64 in the order of (n,) float64; 0 and -0 are one."""
    bits = (values + 0.0).view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _value(key: np.uint64) -> float:
    bits = key & ~_SIGN if key & _SIGN else ~key
    return float(np.asarray([bits], dtype=np.uint64).view(np.float64)[0])
