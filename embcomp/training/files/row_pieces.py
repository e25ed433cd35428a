"""Pieces of long tensors: small files that are there whole or not at all, with their own checksums.

A piece is a safetensors file. Its header says which part of the work it is of and what its bytes add up
to, so that a piece that a power cut left half-written is not taken for one that is done.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import override

from embcomp.errors import CheckpointError
from embcomp.io.atomic_files import atomic_path
from embcomp.io.tensor_checksums import bytes_of
from embcomp.layers.ranged_files import RangedFiles
from embcomp.layers.row_sources import RowSource

_LENGTH = 8  # bytes at the beginning of a safetensors file that say how long its header is


def write_piece(path: Path, tensors: Mapping[str, Tensor], item: str) -> None:
    """Write a piece, whole or not at all.

    Args:
        path: the file.
        tensors: what it holds.
        item: the part of the work that it is of.
    """
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"format": "pt", "item": item, "crc32": _checksum(own)}
    content = safetensors.torch.save(own, about)
    with atomic_path(path, durable=False) as temporary:
        temporary.write_bytes(content)


def read_piece(path: Path, item: str | None = None) -> dict[str, Tensor] | None:
    """What a piece holds; None where it is not there, damaged, or of other work.

    Args:
        path: the file.
        item: the part of the work that it is to be of; None takes any.
    """
    try:
        content = path.read_bytes()
        about = _about(content)
        tensors = safetensors.torch.load(content)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    if (item is not None and about.get("item") != item) or about.get("crc32") != _checksum(tensors):
        return None
    return tensors


def checksum_of(path: Path) -> str:
    """The checksum that a piece states."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        about: dict[str, str] = json.loads(file.read(length))["__metadata__"]
    return about["crc32"]


def _about(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:_LENGTH], "little")
    about: dict[str, str] = json.loads(content[_LENGTH : _LENGTH + length])["__metadata__"]
    return about


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(bytes_of(tensors[name]).data, found)
    return f"{found:08x}"


@dataclass(frozen=True, kw_only=True)
class RowPiece:
    """Consecutive rows in a file.

    Attributes:
        path: the file.
        rows: how many.
        checksum: what the file is to state; None for a file of one's own work.
    """

    path: Path
    rows: int
    checksum: str | None = None


class PieceRows(RowSource):
    """Rows in pieces, one after another; each is checked when it is first read.

    Attributes:
        pieces: the files, in order.
        first: the first row of these that is the source's.

    Args:
        pieces: the files, in order, of one tensor each.
        shape: of the source.
        dtype: of its elements.
        first: rows of the first pieces that are not the source's.
        way_out: what to do about a damaged piece.
    """

    def __init__(
        self,
        pieces: Sequence[RowPiece],
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        first: int = 0,
        way_out: str = "",
    ) -> None:
        super().__init__(shape, dtype)
        self.pieces, self.first = list(pieces), first
        self._way_out = way_out
        self._starts = list(accumulate((piece.rows for piece in pieces), initial=0))
        self._files = RangedFiles()
        self._begins: dict[int, int] = {}

    @override
    def read(self, start: int, stop: int) -> Tensor:
        if start >= stop:
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        start, stop = start + self.first, stop + self.first
        place = bisect_right(self._starts, start) - 1
        found = []
        while place < len(self.pieces) and self._starts[place] < stop:
            low = self._starts[place]
            end = min(stop, self._starts[place + 1])
            if self.pieces[place].rows:
                found.append(self._read_piece(place, max(start, low) - low, end - low))
            place += 1
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read_piece(self, place: int, low: int, high: int) -> Tensor:
        piece = self.pieces[place]
        if place in self._begins:
            offset = self._begins[place] + low * self.row_bytes
            shape = (high - low, *self.shape[1:])
            return self._files.read(piece.path, offset, shape, self.dtype)
        tensors = read_piece(piece.path)
        if tensors is None or piece.checksum not in (None, checksum_of(piece.path)):
            raise CheckpointError(f"{piece.path} is missing or damaged. {self._way_out}".rstrip())
        (rows,) = tensors.values()
        with piece.path.open("rb") as file:
            self._begins[place] = _LENGTH + int.from_bytes(file.read(_LENGTH), "little")
        return rows[low:high]

    @override
    def range(self, start: int, stop: int) -> RowSource:
        return PieceRows(
            self.pieces,
            (stop - start, *self.shape[1:]),
            self.dtype,
            first=self.first + start,
            way_out=self._way_out,
        )
