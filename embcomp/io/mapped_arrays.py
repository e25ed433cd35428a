"""Long arrays in files: what is as long as a vocabulary need not be in memory."""

from __future__ import annotations

import os
import tempfile
from typing import IO

import numpy as np
from numpy.typing import NDArray

from embcomp.errors import DataError

_IN_MEMORY = 1 << 17  # numbers that are no matter


def temporary_zeros(count: int, what: str) -> NDArray[np.int64]:
    """(count,) zeros; where they are many, in a temporary file that is gone once nobody looks at them.

    Args:
        count: how many.
        what: what they are to be, for messages.

    Raises:
        DataError: there is no room for the file.
    """
    if count <= _IN_MEMORY:
        return np.zeros(count, dtype=np.int64)
    with tempfile.TemporaryFile() as file:
        return zeros_in_file(file, count, what)


def temporary_bytes(count: int, what: str) -> NDArray[np.uint8]:
    """(count,) zero bytes, as `temporary_zeros` has numbers.

    Args:
        count: how many.
        what: what they are to be, for messages.

    Raises:
        DataError: there is no room for the file.
    """
    return temporary_zeros(-(-count // 8), what).view(np.uint8)[:count]


def temporary_mask(count: int, what: str) -> NDArray[np.bool_]:
    """(count,) False, as `temporary_zeros` has numbers.

    Args:
        count: how many.
        what: what they are to be, for messages.

    Raises:
        DataError: there is no room for the file.
    """
    return temporary_bytes(count, what).view(np.bool_)


def zeros_in_file(file: IO[bytes], count: int, what: str) -> NDArray[np.int64]:
    """(count,) zeros that are in a file, which pages in and out what is looked at.

    Args:
        file: new, open for reading and writing; it may be closed afterwards.
        count: how many, at least 1.
        what: what they are to be, for messages.

    Raises:
        DataError: its disk has no room for it.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, 8 * count)  # else a full disk shows as a signal
    except OSError as error:
        named = isinstance(file.name, str)
        place = file.name if named else tempfile.gettempdir()
        more = "" if named else ", or set TMPDIR to a folder that has it"
        raise DataError(
            f"{place} has no room for {what}, which takes {8 * count:,} bytes ({error.strerror}); "
            f"make room{more}"
        ) from None
    return np.memmap(file, dtype=np.int64, mode="r+", shape=(count,))
