"""The hash that places ids in rows: the SplitMix64 finaliser over `id XOR salt`.

Salts follow from tables' names, by the first 8 bytes of a name's SHA-256: it is in every language's
library, no likeness of names shows in it, and it will mean the same in twenty years. It is taken once
a table, so that its speed does not matter.

An id's row is part of every saved model, so nothing here may ever change. All arithmetic is modulo
2**64 on int64 tensors, which wrap silently in torch; only the right shift has to be made logical.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embcomp.tables.name_hash import name64

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1
_MASK_63 = (1 << 63) - 1


def splitmix64(x: int) -> int:
    """Hash one integer of any sign to an unsigned 64-bit one (SplitMix64, step and finaliser)."""
    z = (x + _GAMMA) & _MASK_64
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK_64
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK_64
    return z ^ (z >> 31)


def salt(seed: int, table: int, chunk: int) -> int:
    """The unsigned 64-bit salt of one look-up, independent for every (seed, table, chunk).

    Args:
        seed: the method's.
        table: `name64` of the table's name.
        chunk: which of a table's look-ups it is.
    """
    return splitmix64(splitmix64(splitmix64(seed) ^ table) ^ chunk)


def table_salt(seed: int, table: str, chunk: int = 0) -> int:
    """The salt of one look-up of a table, signed as torch wants it."""
    return to_signed(salt(seed, name64(table), chunk))


def to_signed(x: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer, as torch wants its constants."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _xor_shift_(z: Tensor, bits: int) -> Tensor:
    """`z ^= z >> bits` in place, the shift logical."""
    return z.bitwise_xor_((z >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def hash_rows(ids: Tensor, salts: Tensor, num_rows: Tensor | int) -> Tensor:
    """Place ids in rows.

    Args:
        ids: int32 or int64 of any sign.
        salts: int64, broadcastable to `ids`; as `table_salt` makes them.
        num_rows: int64, broadcastable to `ids`, or one for all; how many rows there are to choose from.

    Returns:
        int64 rows in `[0, num_rows)`, of the shape to which the arguments broadcast.
    """
    z = torch.bitwise_xor(ids.to(torch.int64), salts)  # a new tensor: the rest may work in place
    z.add_(to_signed(_GAMMA))
    _xor_shift_(z, 30).mul_(to_signed(_MIX_1))
    _xor_shift_(z, 27).mul_(to_signed(_MIX_2))
    _xor_shift_(z, 31)
    return z.bitwise_and_(_MASK_63).remainder_(num_rows)
