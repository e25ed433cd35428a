"""The hash of texts that `prepare` places values by: fixed for good, the same on every machine.

A library's own hash is a matter of its version. This one is defined over bytes alone. The message
of a text of L bytes of UTF-8 is L in four bytes, the text, and zeros up to a whole number of 8-byte
words, at least two; words are little-endian. With all arithmetic modulo 2**64,

    h = (seed + 1) * GAMMA
    h = (h ^ word) * MIX_1; h ^= h >> 32            for each word of the message
    h = h * MIX_2; h ^= h >> 29

Every step can be undone, so two texts of up to 12 bytes that share their first 4 never collide.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embcomp.data_pipelines.numbering import views_of

GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1
# Texts that are hashed at once: few enough to stay in the cache, many enough to be worth a call.
_ROWS = 32_768
# Arrow keeps a text of up to 12 bytes inside its 16-byte view: the length, the bytes, zeros.
_INLINE = 12

Words = NDArray[np.uint64]


def hash_texts(values: pl.Series, seed: int) -> Words:
    """Return (N,) hashes of N texts (String); what a null gets has no meaning."""
    hashes = np.empty(len(values), dtype=np.uint64)
    views = _views(values)
    for start in range(0, len(hashes), _ROWS):
        _start(views[start : start + _ROWS], seed, hashes[start : start + _ROWS])
    lengths = views.view("<u4")[:, 0]
    if len(lengths) and lengths.max() > _INLINE:
        is_long = lengths > _INLINE
        if values.null_count():
            is_long &= values.is_not_null().to_numpy()
        hashes[is_long] = _long(values.filter(pl.Series(is_long)), views[is_long, 0], seed)
    return hashes


def _views(values: pl.Series) -> Words:
    return views_of(values).words if len(values) else np.empty((0, 2), dtype=np.uint64)


def _start(views: Words, seed: int, hashes: Words) -> None:
    """Hash the two words of each view into `hashes`: all that a text of up to 12 bytes has."""
    shifted = np.empty_like(hashes)
    _take_in(hashes, views[:, 0], shifted, before=np.uint64((seed + 1) * GAMMA & _MASK))
    _take_in(hashes, views[:, 1], shifted)
    _finish(hashes, shifted)


def _take_in(hashes: Words, words: Words, shifted: Words, before: np.uint64 | None = None) -> None:
    """Take one more word into each hash; `before` is what all of them are, if that is so."""
    np.bitwise_xor(hashes if before is None else before, words, out=hashes)
    np.multiply(hashes, np.uint64(MIX_1), out=hashes)
    np.right_shift(hashes, np.uint64(32), out=shifted)
    np.bitwise_xor(hashes, shifted, out=hashes)


def _finish(hashes: Words, shifted: Words) -> None:
    np.multiply(hashes, np.uint64(MIX_2), out=hashes)
    np.right_shift(hashes, np.uint64(29), out=shifted)
    np.bitwise_xor(hashes, shifted, out=hashes)


def _long(values: pl.Series, first: Words, seed: int) -> Words:
    """Hash texts of more than 12 bytes, whose further words lie in a buffer of their own.

    Args:
        first: (N,) the first words of their messages, which are in the views.
    """
    array = values.to_arrow(compat_level=pl.CompatLevel.oldest())
    _, offsets, text = array.buffers()
    starts = np.frombuffer(offsets, dtype="<i8")[array.offset : array.offset + len(array) + 1]
    data = np.zeros(int(starts[-1]) + 8, dtype=np.uint8)
    data[:-8] = np.frombuffer(text, dtype=np.uint8)[: int(starts[-1])]
    # The 8 bytes from every place on, as one overlapping array.
    words = np.ndarray((len(data) - 7,), dtype="<u8", buffer=data, strides=(1,))
    hashes = np.empty_like(first)
    before = np.uint64((seed + 1) * GAMMA & _MASK)
    _take_in(hashes, first, np.empty_like(hashes), before=before)
    for at in range(0, len(hashes), _ROWS):
        stop = min(at + _ROWS, len(hashes))
        _further_words(words, starts[at : stop + 1], hashes[at:stop])
    return hashes


def _further_words(words: Words, starts: NDArray[np.int64], hashes: Words) -> None:
    """Hash what follows the first word, which ends with 4 bytes of the text."""
    lengths = np.diff(starts)
    shortest = int(lengths.min())
    for done in range(4, int(lengths.max()), 8):
        if shortest >= done + 8:
            _take_in(hashes, words[starts[:-1] + done], np.empty_like(hashes))
            continue
        (left,) = np.nonzero(lengths > done)
        spare = np.maximum(0, 8 - (lengths[left] - done)).astype(np.uint64) * np.uint64(8)
        taken = hashes[left]
        word = words[starts[left] + done] & (np.uint64(_MASK) >> spare)
        _take_in(taken, word, np.empty_like(taken))
        hashes[left] = taken
    _finish(hashes, np.empty_like(hashes))
