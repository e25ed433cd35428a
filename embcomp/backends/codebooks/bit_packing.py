"""Small integers packed to their true width, and read back one by one without unpacking the rest.

Code `i` of `bits` bits stands at bit `i * bits` of a stream whose bytes fill from the lowest bit, on
every machine: codes of 16 bits are little-endian. There is no padding but in the last byte.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor, nn

from embcomp.errors import ConfigError
from embcomp.layers.bit_windows import bits_from

MAX_BITS = 16
"""Codes are at most this wide."""

_CHUNK = 1 << 17  # codes packed at once


def bits_for(count: int) -> int:
    """Bits that tell `count` values apart; at least 1."""
    return max(1, (count - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Pack codes.

    Args:
        codes: integers in `[0, 2**bits)`, of any shape; taken in memory order.
        bits: 1 to 16.
        out: (packed_bytes,) uint8 on the CPU, where to write them; a new tensor by default.

    Returns:
        (packed_bytes,) uint8, on the device of the codes unless `out` is given.
    """
    _check_bits(bits)
    size = packed_bytes(codes.numel(), bits)
    packed = torch.empty(size, dtype=torch.uint8) if out is None else out
    assert packed.shape == (size,), f"{codes.numel()} codes of {bits} bits take {size} bytes"
    start = 0
    for part in codes.reshape(-1).split(_CHUNK):
        start = _write(packed, start, part.cpu(), bits)
    return packed.to(codes.device) if out is None else packed


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
        for piece in part.reshape(-1).split(_CHUNK):
            codes = torch.cat([rest, piece.cpu()]) if len(rest) else piece.cpu()
            whole = len(codes) // 8 * 8  # eight codes end with a byte
            start = _write(packed, start, codes[:whole], bits)
            rest = codes[whole:]
    end = _write(packed, start, rest, bits)
    assert end == len(packed), f"{count} codes of {bits} bits were announced, {end} bytes came"
    return packed


def _write(packed: Tensor, start: int, codes: Tensor, bits: int) -> int:
    """Pack codes into the stream from a byte on; the byte after them."""
    if codes.numel():
        low, high = (int(end) for end in codes.aminmax())
        if not 0 <= low <= high < 1 << bits:
            raise ConfigError(
                f"expected codes in [0, {1 << bits}) for {bits} bits; got {low} to {high}"
            )
    size = packed_bytes(len(codes), bits)
    end = start + size
    own = packed[start:end]
    if bits == 8:
        own.copy_(codes)
    elif bits == 16 and _is_aligned(own):
        own.view(torch.int16).copy_(codes)
    else:
        own.copy_(_bytes_of(codes, bits)[:size])
    return end


def _is_aligned(stream: Tensor) -> bool:
    """Whether a stream of 16-bit codes can be looked at as such numbers of this machine."""
    return sys.byteorder == "little" and stream.data_ptr() % 2 == 0


def _bytes_of(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes, eight at a time and zeros in the place of those that lack."""
    eights = nn.functional.pad(codes.to(torch.int32), (0, -len(codes) % 8)).view(-1, 8)
    columns = eights.t().contiguous()  # (8, n)
    found = torch.empty(columns.shape[1], bits, dtype=torch.uint8)
    for byte in range(bits):
        own = range(8 * byte // bits, (8 * byte + 7) // bits + 1)
        shifted = [_shift(columns[code], code * bits - 8 * byte) for code in own]
        found[:, byte] = reduce(torch.bitwise_or, shifted)
    return found.view(-1)


def _shift(codes: Tensor, places: int) -> Tensor:
    return codes << places if places >= 0 else codes >> -places


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes: (count,) int64."""
    _check_bits(bits)
    stream = packed[: packed_bytes(count, bits)]
    if bits == 8:
        return stream.to(torch.int64)
    if bits == 16 and stream.device.type == "cpu" and _is_aligned(stream):
        return stream.view(torch.uint16).to(torch.int64)
    found = torch.empty(count, dtype=torch.int64, device=packed.device)
    for codes, part in zip(found.split(_CHUNK), stream.split(_CHUNK * bits // 8)):
        codes.copy_(_codes_of(part, bits)[: len(codes)])
    return found


def _codes_of(stream: Tensor, bits: int) -> Tensor:
    """The codes of a part of a stream that begins where a code does, and perhaps zeros after them."""
    eights = nn.functional.pad(stream, (0, -len(stream) % bits)).view(-1, bits)
    columns = eights.t().to(torch.int32)  # (bits, n)
    found = torch.empty(columns.shape[1], 8, dtype=torch.int32, device=stream.device)
    for code in range(8):
        own = range(code * bits // 8, (code * bits + bits - 1) // 8 + 1)
        shifted = [_shift(columns[byte], 8 * byte - code * bits) for byte in own]
        found[:, code] = reduce(torch.bitwise_or, shifted)
    return found.view(-1).bitwise_and_((1 << bits) - 1)


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
    # A code begins at a multiple of gcd(bits, 8) within its first byte.
    reach = bits + 1 - math.gcd(bits, 8)
    return bits_from(packed, index * bits, reach) & ((1 << bits) - 1)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"expected 1 to {MAX_BITS} bits a code, got {bits}")
