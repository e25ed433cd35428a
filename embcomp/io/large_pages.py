"""Memory for what is looked up at random, on large pages where the system has them.

A table of many megabytes has more pages of 4 KiB than the processor remembers the places of, so that nearly
every look-up waits twice: for the place of its page, then for its row. On pages of 2 MiB it waits for its
row alone. Linux gives them to memory that asks for them (`madvise`), as most distributions are set; elsewhere,
and where none are free, memory is as any other.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20
"""Bytes of a large page."""
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
_CHUNK = 32 << 20  # bytes that are asked of the system at once; what is not written takes no memory
_LINE = 64  # bytes of a cache line


def ask_for_large_pages(tensor: Tensor) -> None:
    """Ask for large pages under a tensor on the CPU, before it is filled; its values stay as they are.

    Args:
        tensor: contiguous. Nothing is asked for pages that it shares with others.
    """
    madvise = _madvise()
    start = -(-tensor.data_ptr() // LARGE_PAGE) * LARGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes) // LARGE_PAGE * LARGE_PAGE - start
    if madvise is not None and size > 0:
        madvise(start, size, _ADVICE)


@lru_cache
def _madvise() -> Any:
    if _ADVICE is None:
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return found


def _private(length: int) -> mmap.mmap:
    # Shared memory, which `mmap` makes by default, has a setting of its own that is mostly off.
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class LargePages:
    """Hands out memory for tensors that are kept together: one after another on large pages.

    Memory is given back when the last tensor in its piece is gone.
    """

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with a storage of its own; its values are zeros, which take no memory until written.

        Args:
            shape: of no dimension of 0.
            dtype: of its elements.
        """
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        if self._chunk is None or self._used + size > len(self._chunk):
            length = -(-max(size, _CHUNK) // LARGE_PAGE) * LARGE_PAGE
            self._chunk, self._used = _private(length), 0
            ask_for_large_pages(torch.frombuffer(self._chunk, dtype=torch.uint8))
        made = torch.frombuffer(self._chunk, dtype=dtype, count=count, offset=self._used)
        self._used += -(-size // _LINE) * _LINE
        return made.view(shape)
