"""Generated rows as lines of a Criteo log."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from embcomp.data_pipelines.synthetic.click_model import MISSING, RawRows

_DIGITS = 8
_TWO_DIGITS = np.frombuffer("".join(f"{i:02x}" for i in range(256)).encode(), dtype=np.uint16)


def to_lines(rows: RawRows, label: NDArray[np.bool_], file: BinaryIO) -> None:
    """Write (n,) labels and n rows as tab-separated lines."""
    columns = {"label": pl.Series(label.astype(np.uint8))}
    for i, (counts, absent) in enumerate(zip(rows.counts, rows.absent)):
        columns[f"I{i + 1}"] = pl.Series(pl.from_arrow(pa.array(counts, mask=absent)))
    for f, values in enumerate(rows.values):
        columns[f"C{f + 1}"] = pl.Series(pl.from_arrow(_hex_digits(f, values)))
    pl.DataFrame(columns).write_csv(
        file, include_header=False, separator="\t", quote_style="never", null_value=""
    )


def _hex_digits(field: int, values: NDArray[np.int64]) -> pa.Array:
    """Give each value 8 hexadecimal digits of its own: a bijection of 32 bits, without order."""
    z = values.astype(np.uint32) + np.uint32(field * 0x9E3779B1 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        z = (z ^ (z >> np.uint32(shift))) * np.uint32(factor)
    z ^= z >> np.uint32(16)
    digits = _TWO_DIGITS[z.astype(">u4").view(np.uint8)]
    offsets = np.arange(0, _DIGITS * (len(values) + 1), _DIGITS, dtype=np.int32)
    present = np.packbits(values != MISSING, bitorder="little")
    return pa.StringArray.from_buffers(
        len(values), pa.py_buffer(offsets), pa.py_buffer(digits), pa.py_buffer(present)
    )
