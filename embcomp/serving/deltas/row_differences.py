"""Which rows of a block were there before, and the others.

A row of the new block is found among the old rows around its place by a digest, and compared; rows
behind one that was put in or dropped are found where they moved to. What is not found is a literal: its
difference (exclusive or) from the old row in its place, whose bytes are mostly alike where a row was
trained a little. Differences are laid out column by column, so that like bytes stand together.

    int64              how many turns there are
    turns              (place in the block, old row - new row from there on), int64 each
    bits               one for each row of the block, set where it is an old one
    literals           of the other rows, transposed
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.uint8]
"""(rows, bytes of a row)."""
ReadRows = Callable[[int, int], Rows]
"""Reads the rows from one place to another."""

BLOCK_BYTES = 4 << 20
_LEAST_MOVED = 16  # bytes of a row: narrower ones are alike by chance, and cost less than a turn
_MIX = np.uint64(0x9E3779B97F4A7C15)


def rows_per_block(row_bytes: int) -> int:
    """How many rows are looked at together."""
    return max(1, BLOCK_BYTES // row_bytes)


@dataclass(frozen=True, kw_only=True)
class OldRows:
    """The rows that a stretch had before.

    Args:
        read: reads some of them.
        count: how many there are.
    """

    read: ReadRows
    count: int

    def between(self, start: int, stop: int) -> tuple[int, Rows]:
        """Those that there are from one place to another, and the place of the first."""
        low, high = (min(max(at, 0), self.count) for at in (start, stop))
        return low, self.read(low, max(low, high))


@dataclass(frozen=True, kw_only=True)
class BlockDifference:
    """What is to be known of a block beside the old rows.

    Attributes:
        content: the difference; None where all rows are old ones in their places.
        literals: how many rows are not old ones.
        shift: old row - new row at the block's end, from where the next one goes on.
    """

    content: bytes | None
    literals: int
    shift: int


def difference(new: Rows, first: int, old: OldRows, shift: int) -> BlockDifference:
    """The difference of one block.

    Args:
        new: the block.
        first: its first row's place.
        old: the rows before.
        shift: where the block before has ended.
    """
    count = len(new)
    near = (
        first + shift
    )  # rows are looked for up to a block away, and may go on for a block from there
    low, window = old.between(near - count, near + 3 * count)
    shifts = np.full(count, shift)
    places = np.arange(first, first + count) - low
    kept = _alike(new, window, places + shift)
    if not kept.all() and new.shape[1] >= _LEAST_MOVED:
        shifts = _shifts(new, window[: max(0, near + 2 * count - low)], places, shift)
        kept = _alike(new, window, places + shifts)
    if kept.all() and (shifts == shift).all():
        return BlockDifference(content=None, literals=0, shift=shift)
    turns = np.flatnonzero(np.diff(shifts, prepend=shift))
    literals = new[~kept] ^ _taken(window, (places + shifts)[~kept])
    content = b"".join(
        (
            np.array([len(turns)], dtype="<i8").tobytes(),
            np.stack([turns, shifts[turns]], axis=1).astype("<i8").tobytes(),
            np.packbits(kept).tobytes(),
            np.ascontiguousarray(literals.T).tobytes(),
        )
    )
    return BlockDifference(content=content, literals=int((~kept).sum()), shift=int(shifts[-1]))


def restored(
    content: bytes | None, shape: tuple[int, int], first: int, old: OldRows, shift: int
) -> tuple[Rows, int]:
    """The block of which that is the difference, and the shift at its end.

    Raises:
        ValueError: it is not the difference of such a block.
    """
    count, width = shape
    shifts, kept, literals = np.full(count, shift), np.ones(count, dtype=bool), None
    if content is not None:
        turns, kept, literals = _parted(content, shape)
        for (place, value), end in zip(turns, [*turns[1:, 0], count]):
            shifts[place:end] = value
    sources = np.arange(first, first + count) + shifts
    low, window = 0, np.empty((0, width), dtype=np.uint8)
    inside = sources[(sources >= 0) & (sources < old.count)]
    if len(inside):
        if inside.max() - inside.min() > 4 * count:
            raise ValueError("it takes rows from too far away")
        low, window = old.between(int(inside.min()), int(inside.max()) + 1)
    if kept.any() and not ((sources[kept] >= 0) & (sources[kept] < old.count)).all():
        raise ValueError("it takes rows that the old artefact does not have")
    block = _taken(window, sources - low)
    if literals is not None:
        block[~kept] ^= literals
    return block, int(shifts[-1])


def largest_content(shape: tuple[int, int]) -> int:
    """Bytes that a block's difference has at most."""
    count, width = shape
    return 8 + 16 * count + -(-count // 8) + count * width


def _parted(
    content: bytes, shape: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], Rows]:
    """The turns, whether rows are kept, and the other rows."""
    count, width = shape
    bits = -(-count // 8)
    number = int.from_bytes(content[:8], "little")
    at = 8 + 16 * number
    if number > count or len(content) < at + bits:
        raise ValueError("it ends too early")
    turns = np.frombuffer(content[8:at], dtype="<i8").reshape(-1, 2)
    places = turns[:, 0]
    if (places < 0).any() or (places >= count).any() or (np.diff(places) <= 0).any():
        raise ValueError("its turns do not ascend")
    if (np.abs(turns[:, 1]) > 2**56).any():
        raise ValueError("it takes rows from too far away")
    packed = np.frombuffer(content[at : at + bits], dtype=np.uint8)
    kept = np.unpackbits(packed, count=count).astype(bool)
    rest = np.frombuffer(content[at + bits :], dtype=np.uint8)
    number = int((~kept).sum())
    if len(rest) != number * width:
        raise ValueError("it has other rows than it says")
    return turns, kept, rest.reshape(width, number).T


def _taken(window: Rows, places: NDArray[np.int64]) -> Rows:
    """Rows of a window; zeros where it has none."""
    inside = (places >= 0) & (places < len(window))
    found = np.zeros((len(places), window.shape[1]), dtype=np.uint8)
    found[inside] = window[places[inside]]
    return found


def _alike(new: Rows, window: Rows, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each new row is the one at its place in the window."""
    inside = (places >= 0) & (places < len(window))
    return inside & (new == _taken(window, places)).all(axis=1)


def _shifts(new: Rows, window: Rows, places: NDArray[np.int64], shift: int) -> NDArray[np.int64]:
    """For each new row how far away its old row is: as far as that of the last one that was found."""
    if not len(window):
        return np.full(len(new), shift)
    digests, order, counts = np.unique(_digests(window), return_index=True, return_counts=True)
    own = _digests(new)
    at = np.minimum(np.searchsorted(digests, own), len(digests) - 1)
    found = (digests[at] == own) & (counts[at] == 1)
    last = np.maximum.accumulate(np.where(found, np.arange(len(new)), -1))
    return np.where(last >= 0, (order[at] - places)[last], shift)


def _digests(rows: Rows) -> NDArray[np.uint64]:
    """(rows,) a digest of each."""
    width = -(-rows.shape[1] // 8) * 8
    if width != rows.shape[1]:
        padded = np.zeros((len(rows), width), dtype=np.uint8)
        padded[:, : rows.shape[1]] = rows
        rows = padded
    words = np.ascontiguousarray(rows).view("<u8")
    found = np.zeros(len(rows), dtype=np.uint64)
    for column in words.T:
        found = (found ^ column) * _MIX
        found ^= found >> np.uint64(29)
    return found
