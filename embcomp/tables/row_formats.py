"""The types in which rows can be served, and the bytes of a row in each."""

from __future__ import annotations

from typing import Literal, get_args

RowType = Literal["fp32", "fp16", "int8", "int4"]
ROW_TYPES: tuple[RowType, ...] = get_args(RowType)
"""From the most exact to the narrowest."""

BITS = {"int8": 8, "int4": 4}
"""Of a code, where rows are codes with a scale for each row."""
HEAD = 4
"""Bytes of such a row's scale and bias."""

_MULTIPLE = {"int8": 2, "int4": 4}


def row_bytes(dim: int, row_type: RowType) -> int:
    """Bytes of a row of `dim` weights."""
    if row_type in BITS:
        return HEAD + padded_width(dim, row_type) * BITS[row_type] // 8
    return dim * (4 if row_type == "fp32" else 2)


def padded_width(dim: int, row_type: RowType) -> int:
    """Weights that a row of `dim` holds with its padding."""
    multiple = _MULTIPLE.get(row_type, 1)
    return -(-dim // multiple) * multiple
