"""Checksums of pieces: every change of a byte is seen, and bytes may come in parts of any size."""

from __future__ import annotations

import random

import numpy as np
import pytest

from embcomp.io.piece_checksums import CRC32, SUMS64, RunningChecksum, checksum_of_text

MIB = 1 << 20
KINDS = {"sums64": SUMS64, "crc32": CRC32}


def text_of(kind, data):
    return kind.text(kind.numbers(data))


def some_bytes(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [1, 7, 4095, 4097, MIB, MIB + 1, 2 * MIB + 12345])
def test_every_changed_bit_and_every_exchange_is_seen(name, size):
    kind, data, draw = KINDS[name], some_bytes(size), random.Random(size)
    first = text_of(kind, data)
    assert checksum_of_text(first) is kind
    for place in (0, size - 1, *(draw.randrange(size) for _ in range(8))):
        changed = data.copy()
        changed[place] ^= 1 << draw.randrange(8)
        assert text_of(kind, changed) != first
    for width in (1, 8, 64, 4096):
        if size >= 2 * width:
            moved = data.copy()
            moved[:width], moved[-width:] = data[-width:], data[:width]
            assert text_of(kind, moved) != first
    assert size < 2 or text_of(kind, data[::-1].copy()) != first
    assert text_of(kind, np.zeros_like(data)) != text_of(kind, data[:0])


def test_a_missing_and_a_repeated_page_are_seen():
    data = some_bytes(MIB)
    for source, target in ((0, 1), (5, 200), (255, 0)):
        changed = data.copy()
        changed[target * 4096 :][:4096] = data[source * 4096 :][:4096]
        assert text_of(SUMS64, changed) != text_of(SUMS64, data)
        changed[target * 4096 :][:4096] = 0
        assert text_of(SUMS64, changed) != text_of(SUMS64, data)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [0, 100, MIB, 3 * MIB + 77, 9 * MIB])
def test_bytes_may_come_in_parts_of_any_size(name, size):
    kind, data, draw = KINDS[name], some_bytes(size), random.Random(size)
    for largest in (MIB // 3, 5 * MIB):
        running, at = RunningChecksum(kind=kind), 0
        while at < size:
            part = data[at : at + draw.randrange(largest)].copy()
            running.update(part)
            at += len(part)
            part[:] = 0  # what was taken does not change any more
        assert running.text() == text_of(kind, data)
