"""Small integers packed to their true width, and read back one by one without unpacking the rest.

Code ``i`` of ``bits`` bits stands at bit ``i * bits`` of a stream whose bytes fill from the lowest bit.
There is no padding but in the last byte.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from embcomp.errors import ConfigError

MAX_BITS = 16
"""Codes are at most this wide."""

_CHUNK = 1 << 17  # codes packed at once; a multiple of 8, so that every chunk ends with a byte


def bits_for(count: int) -> int:
    """Bits that tell ``count`` values apart; at least 1."""
    return max(1, (count - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes.

    Args:
        codes: integers in ``[0, 2**bits)``, of any shape; taken in memory order.
        bits: 1 to 16.

    Returns:
        (packed_bytes,) uint8.
    """
    _check_bits(bits)
    flat = codes.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 1 << bits:
        raise ConfigError(
            f"expected codes in [0, {1 << bits}) for {bits} bits; "
            f"got {int(flat.min())} to {int(flat.max())}"
        )
    packed = torch.empty(packed_bytes(flat.numel(), bits), dtype=torch.uint8, device=codes.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = _pack(flat[start : start + _CHUNK].to(torch.int64), bits)
        first = start * bits // 8
        packed[first : first + len(part)] = part
    return packed


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(n,) int64 -> (packed_bytes,) uint8."""
    device = codes.device
    is_set = (codes[:, None] >> torch.arange(bits, device=device)) & 1  # (n, bits)
    size = packed_bytes(len(codes), bits)
    stream = is_set.new_zeros(size * 8)
    stream[: is_set.numel()] = is_set.view(-1)
    weights = 1 << torch.arange(8, device=device)
    return (stream.view(size, 8) * weights).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes: (count,) int64."""
    return gather_bits(packed, torch.arange(count, device=packed.device), bits)


def gather_bits(packed: Tensor, index: Tensor, bits: int) -> Tensor:
    """The codes at the given places; only the bytes that hold them are read.

    Args:
        packed: as ``pack_bits`` returns it.
        index: int64 places of codes, of any shape.
        bits: as when they were packed.

    Returns:
        int64 codes of the shape of ``index``.
    """
    _check_bits(bits)
    if bits == 8:
        return packed[index].to(torch.int64)
    start = index * bits
    shift = start & 7
    byte = start >> 3
    code = packed[byte].to(torch.int64)
    # A code begins at a multiple of gcd(bits, 8) within its first byte.
    widest = 8 - math.gcd(bits, 8) + bits
    last = len(packed) - 1
    for further in range(1, -(-widest // 8)):
        beyond = packed[(byte + further).clamp_(max=last)].to(torch.int64)
        code |= beyond << (8 * further)
    return (code >> shift) & ((1 << bits) - 1)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"expected 1 to {MAX_BITS} bits a code, got {bits}")
