"""`tables.bin`: physical tables in a flat file that any language maps, one header in front.

All numbers are little-endian. The header:

    0   8 bytes   EMBFLAT1
    8   uint64    number of tables T
    16  uint64    bytes of the file
    24  40 bytes  zeros

then T entries of 64 bytes:

    0   uint64    first byte of the table's name, in the file
    8   uint32    bytes of the name (UTF-8)
    12  uint32    row type: 0 float32, 1 float16, 2 int8, 3 int4
    16  uint64    rows
    24  uint32    weights of a row
    28  uint32    bytes of a row
    32  uint64    first byte of row 0, a multiple of 4096
    40  24 bytes  zeros

then the names, and then the tables, each at a multiple of 4096. Rows follow each other without padding and
have an artefact's bytes (`embcomp.tables.row_types`): a quantised row is its scale and bias as two float16,
then its codes, of int4 two in a byte, the lower one first; a weight is `code * scale + bias`.
"""

from __future__ import annotations

import mmap
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from embcomp.errors import ArtefactError
from embcomp.io.tensor_files import StoredTensor
from embcomp.tables.row_types import ROW_TYPES, RowType, row_bytes, stored_dtype, unpack

MAGIC = b"EMBFLAT1"
_HEADER = struct.Struct("<8sQQ40x")
_ENTRY = struct.Struct("<QIIQIIQ24x")
_PAGE = 4096
_PIECE = 4 << 20


@dataclass(frozen=True, kw_only=True)
class FlatTable:
    """A table that is to be written.

    Args:
        name: its name.
        dim: weights of a row.
        row_type: how rows are stored.
        rows: where they are now.
    """

    name: str
    dim: int
    row_type: RowType
    rows: StoredTensor


def write_flat(path: Path, tables: Sequence[FlatTable]) -> None:
    """Write tables, a few MiB in memory at a time.

    Args:
        path: the file.
        tables: what to write.
    """
    names = [table.name.encode("utf-8") for table in tables]
    name_at = _HEADER.size + _ENTRY.size * len(tables)
    at = name_at + sum(map(len, names))
    entries = []
    for table, name in zip(tables, names):
        at += -at % _PAGE
        size = row_bytes(table.dim, table.row_type)
        kind, count = ROW_TYPES.index(table.row_type), table.rows.shape[0]
        entries.append(_ENTRY.pack(name_at, len(name), kind, count, table.dim, size, at))
        name_at += len(name)
        at += table.rows.nbytes
    with path.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, len(tables), at))
        file.write(b"".join(entries) + b"".join(names))
        for table in tables:
            file.write(b"\0" * (-file.tell() % _PAGE))
            _copy(table.rows, file)


def _copy(stored: StoredTensor, file: object) -> None:
    left = stored.nbytes
    with stored.file.open("rb") as source:
        source.seek(stored.start)
        while left:
            piece = source.read(min(left, _PIECE))
            if not piece:
                raise ArtefactError(f"{stored.file} is damaged: it ends too early")
            file.write(piece)  # type: ignore[attr-defined]
            left -= len(piece)


class FlatTables:
    """The tables of a flat file, mapped; what stands in for a key-value store in Python.

    Args:
        path: the file.

    Raises:
        ArtefactError: it is no such file, or is not whole.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{path} cannot be read: {error}") from None
        self._tables: dict[str, tuple[Tensor, int, RowType]] = {}
        try:
            magic, count, size = _HEADER.unpack_from(content, 0)
            if magic != MAGIC or size != len(content):
                raise ValueError(f"{len(content):,} bytes")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                whole = torch.frombuffer(content, dtype=torch.uint8)
            for number in range(count):
                entry = _ENTRY.unpack_from(content, _HEADER.size + number * _ENTRY.size)
                name_at, name_size, kind, rows, dim, row_size, start = entry
                name = content[name_at : name_at + name_size].decode("utf-8")
                own = whole[start : start + rows * row_size].view(rows, row_size)
                self._tables[name] = (own, dim, ROW_TYPES[kind])
        except (struct.error, ValueError, IndexError, RuntimeError) as error:
            raise ArtefactError(
                f"{path} is no file of flat tables, or is not whole ({error}); export the run again"
            ) from None

    @property
    def names(self) -> list[str]:
        """The tables in the file's order."""
        return list(self._tables)

    def rows(self, table: str, ids: Tensor) -> Tensor:
        """Rows of a table.

        Args:
            table: its name.
            ids: of any shape; a negative one stands for zeros.

        Returns:
            (*ids.shape, dim) float32.
        """
        stored, dim, row_type = self._tables[table]
        flat = ids.reshape(-1)
        picked = stored[flat.clamp(min=0)].view(stored_dtype(row_type))
        found = unpack(picked, dim, row_type)
        return torch.where(flat.unsqueeze(1) >= 0, found, 0.0).view(*ids.shape, dim)


def read_lookups(
    tables: FlatTables, names: Mapping[str, str], ids: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The rows that a route asked for.

    Args:
        tables: where they are.
        names: the table of each look-up.
        ids: what the route answered.
    """
    return {lookup: tables.rows(names[lookup], own) for lookup, own in ids.items()}
