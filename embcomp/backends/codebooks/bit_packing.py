"""Small integers packed to their true width, and read back one by one without unpacking the rest.

Code `i` of `bits` bits stands at bit `i * bits` of a stream whose bytes fill from the lowest bit.
There is no padding but in the last byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from embcomp.errors import ConfigError

MAX_BITS = 16
"""Codes are at most this wide."""

_CHUNK = 1 << 17  # codes packed at once


def bits_for(count: int) -> int:
    """Bits that tell `count` values apart; at least 1."""
    return max(1, (count - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes.

    Args:
        codes: integers in `[0, 2**bits)`, of any shape; taken in memory order.
        bits: 1 to 16.

    Returns:
        (packed_bytes,) uint8.
    """
    return pack_parts(codes.reshape(-1).split(_CHUNK), bits, codes.numel()).to(codes.device)


def pack_parts(parts: Iterable[Tensor], bits: int, count: int) -> Tensor:
    """Pack codes that come in parts, as if they were one tensor, without holding them all.

    Args:
        parts: integers in `[0, 2**bits)`, of any shape.
        bits: 1 to 16.
        count: how many codes the parts hold together.

    Returns:
        (packed_bytes,) uint8, on the CPU.
    """
    _check_bits(bits)
    packed = torch.empty(packed_bytes(count, bits), dtype=torch.uint8)
    rest = torch.empty(0, dtype=torch.int64)
    start = 0
    for part in parts:
        codes = torch.cat([rest, part.reshape(-1).to("cpu", torch.int64)])
        whole = len(codes) // 8 * 8  # eight codes end with a byte
        start = _write(packed, start, codes[:whole], bits)
        rest = codes[whole:]
    end = _write(packed, start, rest, bits)
    assert end == len(packed), f"{count} codes of {bits} bits were announced, {end} bytes came"
    return packed


def _write(packed: Tensor, start: int, codes: Tensor, bits: int) -> int:
    """Pack codes into the stream from a byte on; the byte after them."""
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
        raise ConfigError(
            f"expected codes in [0, {1 << bits}) for {bits} bits; "
            f"got {int(codes.min())} to {int(codes.max())}"
        )
    is_set = (codes[:, None] >> torch.arange(bits)) & 1  # (n, bits)
    size = packed_bytes(len(codes), bits)
    stream = is_set.new_zeros(size * 8)
    stream[: is_set.numel()] = is_set.view(-1)
    weights = 1 << torch.arange(8)
    packed[start : start + size] = (stream.view(size, 8) * weights).sum(1).to(torch.uint8)
    return start + size


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes: (count,) int64."""
    return gather_bits(packed, torch.arange(count, device=packed.device), bits)


def gather_bits(packed: Tensor, index: Tensor, bits: int) -> Tensor:
    """The codes at the given places; only the bytes that hold them are read.

    Args:
        packed: as `pack_bits` returns it.
        index: int64 places of codes, of any shape.
        bits: as when they were packed.

    Returns:
        int64 codes of the shape of `index`.
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
