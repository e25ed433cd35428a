"""In what type rows are served: float32, float16, or 8 and 4 bits with a scale for each row.

Quantised rows have FBGEMM's format: a row's scale and bias as two float16 in front, then its codes,
two to a byte where they have 4 bits, the lower one first; a weight is `code * scale + bias`. Rows
are not padded to each other on disk, but a row of 8-bit codes holds an even number of them and one
of 4-bit codes a multiple of 4, as FBGEMM's quantisation wants it. That padding is billed.

Small tables of codewords keep float16: they are shared by many ids, so their error would be too. Rows
that are packed integers already are stored as they are, whatever is asked for, and rows for which their method has
chosen a type are stored in that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType

from embcomp.errors import ConfigError
from embcomp.tables.footprint import Footprint, TensorFootprint
from embcomp.tables.row_formats import (
    BITS,
    HEAD,
    ROW_TYPES,
    RowType,
    padded_width,
    row_bytes,
)
from embcomp.tables.specs import PhysicalTable

__all__ = [
    "ROW_TYPES",
    "RowType",
    "check_row_type",
    "largest_error",
    "narrowest",
    "pack",
    "padded_width",
    "row_bytes",
    "row_types",
    "served_footprint",
    "stored_dtype",
    "stored_shape",
    "unpack",
]

_CHUNK = 1 << 18  # rows that are quantised or restored together


def check_row_type(wanted: str) -> RowType:
    """The row type of that name, or a ConfigError that lists them."""
    for known in ROW_TYPES:
        if wanted == known:
            return known
    raise ConfigError(f"rows are served as {', '.join(ROW_TYPES)}; got {wanted!r}")


def narrowest(dim: int, trained: RowType, wanted: RowType) -> RowType:
    """The type of at most `wanted`'s exactness that makes rows shortest.

    A scale takes as much as two weights, so narrow rows are shorter, and more exact, without one.
    """
    start, stop = ROW_TYPES.index(trained), ROW_TYPES.index(wanted)
    candidates = ROW_TYPES[start : max(start, stop) + 1]
    return min(candidates, key=lambda each: row_bytes(dim, each))


def row_types(tables: Sequence[PhysicalTable], wanted: RowType) -> dict[str, RowType]:
    """The type in which each physical table of a method is served.

    Args:
        tables: the method's physical tables.
        wanted: the type asked for.
    """
    found: dict[str, RowType] = {}
    for table in tables:
        trained: RowType = "fp16" if table.data_type is DataType.FP16 else "fp32"
        allowed: RowType = "fp16" if table.is_codebook and wanted in BITS else wanted
        found[table.name] = narrowest(table.embedding_dim, trained, allowed)
        if table.row_type is not None or table.is_packed:
            found[table.name] = table.row_type or "fp32"
    return found


def served_footprint(footprint: Footprint, types: Mapping[str, RowType]) -> Footprint:
    """A footprint whose physical tables are served in the given types."""

    def served(tensor: TensorFootprint) -> TensorFootprint:
        if not tensor.lookup or tensor.name not in types:
            return tensor
        size = row_bytes(tensor.columns, types[tensor.name])
        return dataclasses.replace(tensor, served_row_bytes=size)

    return Footprint(tuple(served(tensor) for tensor in footprint.tensors))


def stored_shape(rows: int, dim: int, row_type: RowType) -> tuple[int, int]:
    """The shape of a stored table: bytes of a row where it is quantised, else its weights."""
    return rows, row_bytes(dim, row_type) if row_type in BITS else dim


def stored_dtype(row_type: RowType) -> torch.dtype:
    """The type of a stored table's elements."""
    plain = {"fp32": torch.float32, "fp16": torch.float16}
    return plain.get(row_type, torch.uint8)


def pack(rows: Tensor, row_type: RowType) -> Tensor:
    """Store rows.

    Args:
        rows: (rows, dim) float32 or float16 on the CPU.
        row_type: the type to store them in.

    Returns:
        A tensor of `stored_shape` and `stored_dtype`.

    Raises:
        ConfigError: for rows that the type cannot hold, or that are not finite.
    """
    if row_type == "fp32":
        return rows.float().contiguous()
    if row_type == "fp16":
        return _finite(rows.to(torch.float16), row_type).contiguous()
    stored = torch.empty(stored_shape(rows.shape[0], rows.shape[1], row_type), dtype=torch.uint8)
    for start in range(0, len(rows), _CHUNK):
        stored[start : start + _CHUNK] = _quantized(rows[start : start + _CHUNK], row_type)
    return stored


def _quantized(rows: Tensor, row_type: RowType) -> Tensor:
    missing = padded_width(rows.shape[1], row_type) - rows.shape[1]
    if missing:  # copies of a weight leave a row's range, and so its steps, as they are
        rows = torch.cat((rows, rows[:, -1:].expand(-1, missing)), dim=1)
    fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(
        rows.float().contiguous(), BITS[row_type]
    )
    head = fused[:, -HEAD:].contiguous()
    _finite(head.view(torch.float16), row_type)
    return torch.cat((head, fused[:, :-HEAD]), dim=1)


def _finite(values: Tensor, row_type: RowType) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ConfigError(
            f"a table holds weights that {row_type} rows cannot: not finite, or beyond float16's "
            "range of 65,504; export them as fp32"
        )
    return values


def unpack(stored: Tensor, dim: int, row_type: RowType) -> Tensor:
    """Restore stored rows: (rows, dim) float32, by plain torch operations on any device.

    Args:
        stored: any number of rows as `pack` made them.
        dim: weights of a row, without padding.
        row_type: the type that they are stored in.
    """
    if row_type not in BITS:
        return stored.float()
    head = _heads(stored).float()
    codes = stored[:, HEAD:]
    if row_type == "int4":
        codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
    return codes[:, :dim].float() * head[:, :1] + head[:, 1:]


def _heads(stored: Tensor) -> Tensor:
    """(rows, 2) float16 scales and biases, in place where they lie as numbers can."""
    if torch.compiler.is_compiling() or not stored.is_contiguous() or stored.storage_offset() % 2:
        return stored[:, :HEAD].contiguous().view(torch.float16)
    return stored.view(torch.float16)[:, : HEAD // 2]


def largest_error(rows: Tensor, stored: Tensor, row_type: RowType) -> float:
    """The largest difference between weights and what is stored for them."""
    error = 0.0
    for start in range(0, len(rows), _CHUNK):
        own = slice(start, start + _CHUNK)
        restored = unpack(stored[own], rows.shape[1], row_type)
        error = max(error, float((restored - rows[own].float()).abs().max()))
    return error
