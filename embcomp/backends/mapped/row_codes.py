"""Numbers of rows packed to their true width, in streams of different widths that are read together.

The streams are those of `embcomp.backends.codebooks.bit_packing`, which knows one width of at most 16 bits
for all codes of a call; here a width is a tensor, of up to 32 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from embcomp.layers.bit_windows import bits_from

MAX_BITS = 32
BLOCK = 1 << 13
"""Ids whose codes are packed together; a multiple of 8, so that a block ends with a byte."""


def bits_for_rows(count: int) -> int:
    """Bits that tell so many rows apart; at least 1."""
    return max(1, (count - 1).bit_length())


def stream_bytes(count: int, bits: int) -> int:
    """Bytes of a stream of so many codes, which ends with a byte."""
    return -(-count * bits // 8)


def packed(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """A stream of codes, from the lowest bit on.

    Args:
        codes: (n,) in `[0, 2**bits)`.
        bits: 1 to 32.
    """
    places = np.arange(bits, dtype=np.int64)
    spread = (codes.astype(np.int64)[:, None] >> places) & 1
    return np.packbits(spread.astype(np.uint8), bitorder="little")


def gather_codes(streams: Tensor, starts: Tensor, masks: Tensor | int, widest: int) -> Tensor:
    """Codes of any widths, at any bits.

    Args:
        streams: (bytes,) uint8.
        starts: int64 the first bit of each code, of any shape.
        masks: int64 ones in the place of each code's bits, broadcastable to it.
        widest: the largest width.

    Returns:
        int64 codes of the shape of `starts`.
    """
    return bits_from(streams, starts, widest) & masks
