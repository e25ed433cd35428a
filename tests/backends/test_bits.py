"""Packed codes take their true bits and come back as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from embcomp.backends.codebooks.bit_packing import (
    bits_for,
    gather_bits,
    pack_bits,
    pack_parts,
    packed_bytes,
    unpack_bits,
)
from embcomp.errors import ConfigError


def random_codes(count, bits, seed=0):
    return torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 16), st.integers(0, 70), st.integers(0, 1000))
def test_round_trip(bits, count, seed):
    codes = random_codes(count, bits, seed)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", [1, 4, 8, 10, 12, 16])
def test_any_code_is_read_alone(bits):
    codes = random_codes(999, bits)
    packed = pack_bits(codes.view(333, 3), bits)
    index = torch.tensor([[998, 0, 5], [5, 997, 996]])
    assert torch.equal(gather_bits(packed, index, bits), codes[index])


def test_bits_are_laid_out_from_the_lowest():
    assert pack_bits(torch.tensor([1, 2, 15]), 4).tolist() == [0x21, 0x0F]
    assert pack_bits(torch.tensor([0x3FF, 0]), 10).tolist() == [0xFF, 0x03, 0]


def bit_by_bit(codes, bits):
    """The definition: code `i` begins at bit `i * bits`, the lowest bit of a byte comes first."""
    stream = sum(int(code) << (place * bits) for place, code in enumerate(codes))
    return list(stream.to_bytes(packed_bytes(len(codes), bits), "little"))


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_every_width_is_laid_out_as_defined(bits, dtype):
    codes = random_codes(37, bits).to(dtype)
    packed = pack_bits(codes, bits)
    assert packed.tolist() == bit_by_bit(codes, bits)
    # In the middle of a longer stream too, at an odd place, where 16-bit views cannot stand.
    for start in (0, 1, 2):
        stream = torch.full((len(packed) + 3,), 0xAA, dtype=torch.uint8)
        own = stream[start : start + len(packed)]
        assert pack_bits(codes, bits, out=own) is own
        assert torch.equal(own, packed)
        rest = torch.cat([stream[:start], stream[start + len(packed) :]])
        assert set(rest.tolist()) == {0xAA}
        assert torch.equal(unpack_bits(own, bits, 37), codes.to(torch.int64))


@pytest.mark.parametrize("bits", [8, 16])
def test_whole_bytes_are_the_same_on_machines_of_the_other_order(bits, monkeypatch):
    codes = random_codes(50, bits)
    packed = pack_bits(codes, bits)
    monkeypatch.setattr("sys.byteorder", "big")  # no views then
    assert torch.equal(pack_bits(codes, bits), packed)
    assert torch.equal(unpack_bits(packed, bits, 50), codes)


def test_long_streams_are_packed_in_parts():
    codes = random_codes((1 << 18) + 13, 11)
    assert torch.equal(unpack_bits(pack_bits(codes, 11), 11, len(codes)), codes)
    parts = codes.split([5, 0, 1000, 3, len(codes) - 1008])
    assert torch.equal(pack_parts(parts, 11, len(codes)), pack_bits(codes, 11))


def test_bits_that_tell_values_apart():
    assert [bits_for(count) for count in (1, 2, 3, 4, 5, 16, 17, 256, 257, 65536)] == [
        *(1, 1, 2, 2, 3, 4, 5, 8, 9, 16)
    ]


@pytest.mark.parametrize("code", [-1, 16])
def test_a_code_that_does_not_fit_is_refused(code):
    with pytest.raises(ConfigError, match=r"codes in \[0, 16\) for 4 bits"):
        pack_bits(torch.tensor([3, code]), 4)
    with pytest.raises(ConfigError, match="1 to 16 bits"):
        pack_bits(torch.tensor([3]), 17)
