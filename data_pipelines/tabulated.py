"""Numbers looked up in a table of consecutive whole ones, by compiled code."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embcomp.io.compiled_library import optional_library


@lru_cache
def _library() -> ctypes.CDLL | None:
    """The compiled code; None where there is none."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    table, numbers = [pointer, pointer, integer, integer], [pointer, pointer, integer, integer]
    functions = {"embcomp_tabulated": (integer, [*table, *numbers, *[pointer] * 3])}
    return optional_library("embcomp.data_pipelines", "tabulated.cpp", functions)


def can_tabulate() -> bool:
    """Whether numbers can be looked up on this machine."""
    return _library() is not None


class NumberTable:
    """What the whole numbers from `least` on become.

    Args:
        least: the first number.
        entries: (S,) what each becomes.
        counted: (S,) which are to be counted.
    """

    def __init__(
        self, *, least: int, entries: NDArray[np.float32], counted: NDArray[np.bool_]
    ) -> None:
        self._least = least
        self._entries = np.ascontiguousarray(entries, dtype=np.float32)
        self._counted = np.ascontiguousarray(counted, dtype=np.uint8)

    def look_up(self, numbers: pl.Series) -> tuple[NDArray[np.float32], int, NDArray[np.int64]]:
        """Look up (N,) numbers (Float64).

        Returns:
            (N,) what they become, 0 for a null; how many are to be counted; and the places of those that the
            table lacks, -0.0 and NaN among them.
        """
        library = _library()
        assert library is not None and numbers.dtype == pl.Float64
        array = numbers.rechunk().to_arrow()
        valid, data = array.buffers()
        found = np.empty(len(numbers), dtype=np.float32)
        left = np.empty(len(numbers) + 1, dtype=np.int64)
        counted = ctypes.c_int64(0)
        size = library.embcomp_tabulated(
            data.address + 8 * array.offset,
            valid.address if valid is not None else None,
            array.offset,
            len(numbers),
            self._entries.ctypes.data,
            self._counted.ctypes.data,
            self._least,
            len(self._entries),
            found.ctypes.data,
            ctypes.byref(counted),
            left.ctypes.data,
        )
        return found, counted.value, left[:size]
