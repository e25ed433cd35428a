"""The bits from any place of a stream of bytes on, read as one number."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor


def bits_from(stream: Tensor, starts: Tensor, widest: int) -> Tensor:
    """Numbers whose lowest bits are those that stand at the given places.

    Args:
        stream: (bytes,) uint8, each filled from its lowest bit.
        starts: int64 places of bits, of any shape.
        widest: how many bits are wanted at most, up to 32; those above may be anything.

    Returns:
        int64 of the shape of `starts`.
    """
    if torch.compiler.is_compiling() or sys.byteorder != "little":
        return _byte_by_byte(stream, starts, widest)
    size, dtype = (4, torch.int32) if widest + 7 <= 32 else (8, torch.int64)
    if stream.shape[0] < size:
        stream = F.pad(stream, (0, size - stream.shape[0]))
    first = (starts >> 3).clamp_(max=stream.shape[0] - size)
    found = stream.unfold(0, size, 1)[first].view(dtype).squeeze(-1)
    return found >> torch.sub(starts, first, alpha=8)


def _byte_by_byte(stream: Tensor, starts: Tensor, widest: int) -> Tensor:
    """The same in operations that every exporter and every machine has."""
    byte, last = starts >> 3, stream.shape[0] - 1
    found = stream[byte].to(torch.int64)
    for further in range(1, -(-(widest + 7) // 8)):
        found |= stream[(byte + further).clamp_(max=last)].to(torch.int64) << (8 * further)
    return found >> (starts & 7)
