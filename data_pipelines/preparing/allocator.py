"""What the C library keeps of memory that was freed: threads of one pass leave it where others cannot take it."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def give_memory_back() -> None:
    """Let glibc give freed memory back to the system; other C libraries have no such call."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
