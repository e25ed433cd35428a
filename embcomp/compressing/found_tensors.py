"""What a source of trained tensors holds: names, shapes and types, and rows that are read by offset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from typing_extensions import override

from embcomp.errors import CheckpointError, DataError
from embcomp.layers.ranged_files import RangedFiles
from embcomp.layers.row_sources import RowSource

FLOATS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
    torch.float8_e4m3fnuz: "fp8",
    torch.float8_e5m2fnuz: "fp8",
}
"""Types of rows that are read, and what they are called."""


@dataclass(frozen=True, kw_only=True)
class FoundTensor:
    """A tensor of a source; nothing of it is read yet.

    Args:
        name: its name there.
        shape: its shape.
        dtype: its type.
        open: gives what reads it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    open: Callable[[], RowSource]

    @property
    def nbytes(self) -> int:
        """Its size."""
        size = self.dtype.itemsize
        for count in self.shape:
            size *= count
        return size

    def __str__(self) -> str:
        shape = " x ".join(f"{count:,}" for count in self.shape)
        return f"{self.name} ({shape} {FLOATS.get(self.dtype, str(self.dtype).split('.')[-1])})"


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """A checkpoint of any layout.

    Args:
        path: where it is.
        layout: what it is, for people.
        tensors: what it holds.
        files: what it consists of; they must not change while they are worked with.
    """

    path: Path
    layout: str
    tensors: Sequence[FoundTensor]
    files: Sequence[Path]


def first_odd_row(rows: Tensor) -> int | None:
    """The first of some rows that holds NaN or an infinity; None where none does."""
    if bool(rows.sum().isfinite()):  # it would not be, and is found in a quarter of the time
        return None
    odd = (~rows.isfinite().all(1)).nonzero()
    return int(odd[0, 0]) if len(odd) else None


class FileRows(RowSource):
    """A tensor whose elements lie in a file one after another.

    Args:
        path: the file.
        offset: of the first byte.
        shape: of the tensor.
        dtype: of its elements.
        files: keeps files open.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        files: RangedFiles,
    ) -> None:
        super().__init__(shape, dtype)
        self._path, self._offset, self._files = path, offset, files

    @override
    def read(self, start: int, stop: int) -> Tensor:
        offset = self._offset + start * self.row_bytes
        shape = (max(0, stop - start), *self.shape[1:]) if self.shape else ()
        return self._files.read(self._path, offset, shape, self.dtype)


class CheckedRows(RowSource):
    """Rows as float32, each of which is looked at when it is read.

    Args:
        tensor: what they are, for errors.
        rows: (N, columns) of any of `FLOATS`.
        scale: what they are multiplied by: (1, 1) or (N, 1) float32; None where they stand for
            themselves.
    """

    def __init__(self, tensor: str, rows: RowSource, scale: Tensor | None = None) -> None:
        super().__init__(rows.shape, torch.float32)
        self._tensor, self._rows, self._scale = tensor, rows, scale

    @property
    @override
    def cost(self) -> int:
        return self.row_bytes + self._rows.cost

    @override
    def read(self, start: int, stop: int) -> Tensor:
        found = self._whole(lambda: self._rows.read(start, stop), slice(start, stop))
        odd = first_odd_row(found)
        if odd is not None:
            self._refuse(start + odd)
        return found

    @override
    def take(self, ids: Tensor) -> Tensor:
        found = self._whole(lambda: self._rows.take(ids), ids)
        odd = first_odd_row(found)
        if odd is not None:
            self._refuse(int(ids[odd]))
        return found

    def _whole(self, read: Callable[[], Tensor], rows: slice | Tensor) -> Tensor:
        """Rows as they are read, as float32 and multiplied by their scales."""
        try:
            found = read().to(torch.float32)
        except (OSError, CheckpointError) as error:
            raise DataError(f"{self._tensor}: cannot be read: {error}") from None
        if self._scale is None:
            return found
        return found * (self._scale if len(self._scale) == 1 else self._scale[rows])

    def _refuse(self, row: int) -> NoReturn:
        raise DataError(
            f"{self._tensor}: row {row:,} holds NaN or an infinity, so that nothing was written; "
            "save weights from before training diverged"
        )
