"""Blocks of plain lines, read by compiled code where there is a compiler.

What is plain is the same to every reader: ASCII without quotes or carriage returns, as many fields in every
line as there are columns, numbers of ordinary digits. Of any other block nothing is said here.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import polars as pl
import pyarrow as pa

from embcomp.data_pipelines.numbering import Numbering, numbering_function
from embcomp.io.compiled_library import optional_library

_VIEW_BYTES = 16


class _Column(ctypes.Structure):
    """One column, as the compiled reader knows it."""

    _fields_ = (
        ("kind", ctypes.c_uint8),
        ("values", ctypes.c_void_p),
        ("valid", ctypes.c_void_p),
        ("numbering", ctypes.c_void_p),
        ("missing", ctypes.c_int64),
    )


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How fields become values: what compiled code calls it, and the type and size of what it makes."""

    code: int
    arrow: pa.DataType
    bytes: int = 8


_TEXT = _Kind(code=0, arrow=pa.string_view(), bytes=_VIEW_BYTES)
_NUMBERED = _Kind(code=4, arrow=pa.uint32(), bytes=4)
KINDS = {
    "text": _TEXT,
    "int": _Kind(code=1, arrow=pa.int64()),
    "float": _Kind(code=2, arrow=pa.float64()),
    "label": _Kind(code=2, arrow=pa.float64()),
    "whole": _Kind(code=3, arrow=pa.float64()),
}
"""What columns may hold: those of `delimited`."""


@lru_cache
def _library() -> ctypes.CDLL | None:
    """The compiled reader; None where there is none, which costs speed alone."""
    if sys.byteorder != "little":
        return None
    pointer, integer, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    block, columns = [ctypes.c_char_p, integer, ctypes.c_char, small], [pointer, integer, pointer]
    functions = {"embcomp_plain_lines": (small, [*block, *columns])}
    return optional_library("embcomp.data_pipelines.importers", "plain_lines.cpp", functions)


def read_plain_lines(
    data: bytes,
    rows: int,
    columns: Sequence[tuple[str, str]],
    separator: str,
    numberings: Mapping[str, Numbering],
) -> pl.DataFrame | None:
    """Read a block of lines whose fields are cut by a separator.

    Args:
        data: the block, without quotes that mean something.
        rows: how many lines it has.
        columns: their names and kinds (`KINDS`); an empty field is a null.
        separator: one ASCII character.
        numberings: columns of texts that are to be numbered: they come as UInt32, 0 where empty.

    Returns:
        A row for each line; None where the block is not plain, or nothing is compiled.

    Raises:
        MemoryError: there is none for one more value.
    """
    library = _library()
    if library is None or len(data) >= 2**31 or len(separator.encode()) != 1:
        return None
    kinds = [
        _NUMBERED if kind == "text" and name in numberings else KINDS[kind]
        for name, kind in columns
    ]
    values = [np.empty(rows * kind.bytes, dtype=np.uint8) for kind in kinds]
    valid = np.zeros((len(columns), -(-rows // 8)), dtype=np.uint8)
    described = (_Column * len(columns))()
    number = numbering_function() if numberings else None
    with ExitStack() as held:
        for numbering in numberings.values():
            held.enter_context(numbering.held)
        for column, (name, _), kind, room, bits in zip(described, columns, kinds, values, valid):
            column.kind, column.values = kind.code, room.ctypes.data
            column.valid = bits.ctypes.data
            column.numbering = numberings[name].handle if kind is _NUMBERED else None
        odd = library.embcomp_plain_lines(
            data, len(data), separator.encode(), len(columns), ctypes.byref(described), rows, number
        )
    if odd < 0:
        raise MemoryError
    if odd:
        return None
    text = pa.py_buffer(data)
    frame = {}
    for column, (name, _), kind, room, bits in zip(described, columns, kinds, values, valid):
        nulls = 0 if kind is _NUMBERED else column.missing
        buffers = [pa.py_buffer(bits) if nulls else None, pa.py_buffer(room)]
        if kind is _TEXT:
            buffers.append(text)
        frame[name] = pl.from_arrow(pa.Array.from_buffers(kind.arrow, rows, buffers, nulls))
    return pl.DataFrame(frame)
