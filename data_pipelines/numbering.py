"""The distinct values of a feature, numbered as they come, by compiled code where there is a compiler.

A row's value is hashed and compared once: from then on it is a small number, by which `prepare` counts
it, stores it and, when ids are known, finds its id.
"""

from __future__ import annotations

import ctypes
import secrets
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from embcomp.io.compiled_library import optional_library


@dataclass(frozen=True, kw_only=True)
class Views:
    """Arrow's views of texts, without a copy.

    Attributes:
        words: (N, 2) uint64.
        valid: the bits that tell which texts there are; None where all are there.
        first: the place of the first text's bit.
        texts: where texts of more than 12 bytes lie.
    """

    words: NDArray[np.uint64]
    valid: pa.Buffer | None
    first: int
    texts: Sequence[pa.Buffer]


def views_of(values: pl.Series) -> Views:
    """Return the views of N > 0 texts (String)."""
    array = values.rechunk().to_arrow(compat_level=pl.CompatLevel.newest())
    valid, words, *texts = array.buffers()
    pairs = np.frombuffer(words, dtype="<u8").reshape(-1, 2)
    return Views(
        words=pairs[array.offset : array.offset + len(array)],
        valid=valid,
        first=array.offset,
        texts=texts,
    )


@lru_cache
def _library() -> ctypes.CDLL | None:
    """The compiled code; None where there is none, which costs speed alone."""
    if sys.byteorder != "little":
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    values, found = [pointer, pointer, pointer, integer], [pointer, integer, pointer]
    return optional_library(
        "embcomp.data_pipelines",
        "numbering.cpp",
        {
            "embcomp_numbering_new": (pointer, [ctypes.c_uint64]),
            "embcomp_numbering_free": (None, [pointer]),
            "embcomp_numbering_size": (integer, [pointer]),
            "embcomp_numbering_bytes": (integer, [pointer]),
            "embcomp_numbering_text_bytes": (integer, [pointer]),
            "embcomp_numbering_add": (ctypes.c_int32, [*values, *found]),
            "embcomp_numbering_count": (None, [pointer, pointer, pointer, integer]),
            "embcomp_numbering_values": (None, [pointer] * 4),
        },
    )


def can_number() -> bool:
    """Whether values can be numbered on this machine."""
    return _library() is not None


def numbering_function() -> int:
    """The address of what numbers fields of a block, for other compiled code."""
    library = _library()
    assert library is not None
    return int(ctypes.cast(library.embcomp_numbering_add_fields, ctypes.c_void_p).value or 0)


class Numbering:
    """Distinct values, numbered from 1 on in the order in which they come.

    A block is numbered while another thread counts the one before, so whoever calls compiled code holds it.

    Attributes:
        held: the lock to hold while other compiled code uses `handle`.

    Raises:
        MemoryError: there is none for one more value.
    """

    def __init__(self) -> None:
        library = _library()
        assert library is not None
        self._library = library
        # Drawn, so that nobody can write a log whose values all meet in one slot.
        self._handle = library.embcomp_numbering_new(secrets.randbits(64))
        if not self._handle:
            raise MemoryError
        self._free = weakref.finalize(self, library.embcomp_numbering_free, self._handle)
        self.held = threading.RLock()

    def __len__(self) -> int:
        with self.held:
            self._refuse_closed()
            return int(self._library.embcomp_numbering_size(self._handle))

    @property
    def bytes(self) -> int:
        """What the values take."""
        with self.held:
            self._refuse_closed()
            return int(self._library.embcomp_numbering_bytes(self._handle))

    @property
    def handle(self) -> int:
        """What compiled code knows it by."""
        self._refuse_closed()
        return int(self._handle)

    def _refuse_closed(self) -> None:
        if not self._free.alive:
            raise ValueError("the values of this numbering were let go of")

    def number(self, values: pl.Series) -> NDArray[np.uint32]:
        """Return the (N,) numbers of N values (String); a null gets 0."""
        numbers = np.empty(len(values), dtype=np.uint32)
        if not len(values):
            return numbers
        views = views_of(values)
        texts = (ctypes.c_void_p * max(1, len(views.texts)))(
            *(text.address for text in views.texts)
        )
        with self.held:
            self._refuse_closed()
            failed = self._library.embcomp_numbering_add(
                self._handle,
                views.words.ctypes.data,
                views.valid.address if views.valid is not None else None,
                views.first,
                texts,
                len(values),
                numbers.ctypes.data,
            )
        if failed:
            raise MemoryError
        return numbers

    def count(self, numbers: NDArray[np.uint32], counted: NDArray[np.bool_]) -> None:
        """Count values by (N,) of their numbers, those alone that are `counted`."""
        numbers, counted = np.ascontiguousarray(numbers), np.ascontiguousarray(counted)
        with self.held:
            self._refuse_closed()
            assert len(numbers) == len(counted) and int(numbers.max(initial=0)) <= len(self)
            self._library.embcomp_numbering_count(
                self._handle, numbers.ctypes.data, counted.ctypes.data, len(numbers)
            )

    def values(self) -> tuple[pa.LargeStringArray, NDArray[np.int64]]:
        """Return the (N,) values by their numbers, from 1 on, and (N,) how often each was counted."""
        with self.held:
            size = len(self)
            counts = np.empty(size, dtype=np.int64)
            offsets = np.empty(size + 1, dtype=np.int64)
            text = np.empty(
                max(1, self._library.embcomp_numbering_text_bytes(self._handle)), dtype=np.uint8
            )
            self._library.embcomp_numbering_values(
                self._handle, counts.ctypes.data, offsets.ctypes.data, text.ctypes.data
            )
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
        return pa.LargeStringArray.from_buffers(size, *buffers[1:]), counts

    def close(self) -> None:
        """Give the memory back."""
        with self.held:
            self._free()
