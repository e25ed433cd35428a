"""Sizes in bytes: one reading for budgets, devices and the memory of `prepare`."""

from __future__ import annotations

import pytest

from embcomp.io.byte_sizes import parse_bytes
from embcomp.tables.budget import parse_budget

SIZES = {
    "7": 7,
    "7b": 7,
    " 64MiB ": 64 << 20,
    "512 mib": 512 << 20,
    "512Mi": 512 << 20,
    "4G": 4 * 10**9,
    "4GB": 4 * 10**9,
    "4GiB": 4 << 30,
    "1.5 GB": 1_500_000_000,
    "0.5KiB": 512,
    "2TiB": 2 << 40,
}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes_are_read_in_the_usual_units(text, size):
    assert parse_bytes(text) == size
    assert parse_budget(text) == size


@pytest.mark.parametrize(
    "text", ["", "lots", "-3MiB", "64 MiBs", "1e6", "iB", "4i", "10%", "4 M B"]
)
def test_what_is_no_size_is_none(text):
    assert parse_bytes(text) is None
