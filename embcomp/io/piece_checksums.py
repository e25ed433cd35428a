"""Checksums of pieces of bytes that are in the processor's cache anyway: read, copied or made there.

A checksum's text says what it is made of, so that older artefacts can still be checked:

    sums64:3f2a90c1   pieces of 1 MiB, each by the sums of its 64-bit words along the rows and the columns
                      of a matrix 512 words wide; ten times as fast as a CRC-32, whose sums it takes
    3f2a90c1          pieces of 8 MiB, each by its CRC-32

and of the pieces' numbers, in order, the CRC-32. Sums along both axes see every change of a word, of
a page or of a row of either axis, and words that changed places; what they cannot see are changes of
at least four words that cancel in pairs. They determine Fletcher's checksum of the words (J. G. Fletcher,
"An Arithmetic Checksum for Serial Transmissions", 1982). They find damage, and are no signature.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_WORDS = 512  # of a row: 4 KiB, a page
_ROW = 8 * _WORDS


def _word_sums(piece: Bytes) -> int:
    if len(piece) % _ROW:
        padded = np.zeros(-(-len(piece) // _ROW) * _ROW, dtype=np.uint8)
        padded[: len(piece)] = piece
        piece = padded
    words = piece.view("<u8").reshape(-1, _WORDS)
    columns, rows = np.add.reduce(words, axis=0), np.add.reduce(words, axis=1)
    return zlib.crc32(rows.data, zlib.crc32(columns.data))


def _crc32(piece: Bytes) -> int:
    return zlib.crc32(piece.data)


@dataclass(frozen=True, kw_only=True)
class PieceChecksum:
    """How a checksum is made.

    Args:
        prefix: what its text begins with.
        piece: bytes that are looked at together; the last piece is shorter.
        of_piece: the number of a contiguous piece.
    """

    prefix: str
    piece: int
    of_piece: Callable[[Bytes], int]

    def text(self, numbers: Sequence[int]) -> str:
        """The checksum of all pieces' numbers, in order."""
        return f"{self.prefix}{zlib.crc32(struct.pack(f'<{len(numbers)}I', *numbers)):08x}"

    def numbers(self, data: Bytes) -> list[int]:
        """The numbers of bytes that begin where a piece begins."""
        return [self.of_piece(data[at : at + self.piece]) for at in range(0, len(data), self.piece)]


SUMS64 = PieceChecksum(prefix="sums64:", piece=1 << 20, of_piece=_word_sums)
CRC32 = PieceChecksum(prefix="", piece=8 << 20, of_piece=_crc32)


def checksum_of_text(text: str) -> PieceChecksum:
    """How the checksum of that text was made."""
    return SUMS64 if text.startswith(SUMS64.prefix) else CRC32


@dataclass(kw_only=True)
class RunningChecksum:
    """The checksum of bytes that come in parts of any size.

    Args:
        kind: how it is made.
    """

    kind: PieceChecksum = SUMS64
    _numbers: list[int] = field(default_factory=list)
    _begun: list[Bytes] = field(default_factory=list)
    _size: int = 0  # of what has begun: less than a piece

    def update(self, data: Bytes) -> None:
        """Take the next bytes; they may change afterwards."""
        piece = self.kind.piece
        if self._size:
            missing = min(piece - self._size, len(data))
            self._begin(data[:missing])
            data = data[missing:]
            if self._size == piece:
                self._end()
        whole = len(data) // piece * piece
        self._numbers += self.kind.numbers(data[:whole])
        self._begin(data[whole:])

    def text(self) -> str:
        """The checksum of all bytes; the last thing that is asked for."""
        if self._size:
            self._end()
        return self.kind.text(self._numbers)

    def _begin(self, data: Bytes) -> None:
        if len(data):
            self._begun.append(data.copy())
            self._size += len(data)

    def _end(self) -> None:
        self._numbers.append(self.kind.of_piece(np.concatenate(self._begun)))
        self._begun, self._size = [], 0
