"""Ids go where saved models expect them, for ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from embcomp.layers.hashing import hash_rows, salt, splitmix64, table_salt, to_signed
from embcomp.layers.hashing_compiled import hash_each, library
from embcomp.tables.name_hash import name64

INT64 = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize(
    ("x", "hashed"),
    [
        (0, 0xE220A8397B1DCDAF),
        (1, 0x910A2DEC89025CC1),
        (2**63 - 1, 0x2A67D7552E039EA7),
        (-1, 0xE4D971771B652C20),
    ],
)
def test_splitmix64_vectors(x, hashed):
    assert splitmix64(x) == hashed


def test_salt_vector():
    assert salt(2021, 0, 0) == 0xEB0319F02E0B47F8


@pytest.mark.parametrize(
    ("id_", "feature", "chunk", "num_rows", "row"),
    [
        (0, 0, 0, 1000003, 781082),
        (1, 0, 0, 1000003, 411432),
        (1, 1, 0, 1000003, 258426),
        (1, 0, 1, 1000003, 169329),
        (123456789, 25, 3, 65536, 20868),
        (-1, 0, 0, 1000003, 39794),
    ],
)
def test_row_vectors(id_, feature, chunk, num_rows, row):
    salts = torch.tensor([to_signed(salt(2021, feature, chunk))])
    assert hash_rows(torch.tensor([id_]), salts, torch.tensor([num_rows])).tolist() == [row]


@pytest.mark.parametrize(
    ("table", "hashed", "salted", "rows"),
    [
        ("C1", 0x432EDC70C11D86AB, 0xA4535E3DB9DFDBDC, (825194, 425941)),
        ("user_id", 0x41324560696B9DF8, 0xADD1065B9EBC1995, (400327, 269980)),
        ("item", 0x2B5FA65FCDEA334A, 0x7526C0507A9C2B60, (840333, 930017)),
        ("商品", 0x2B8F361F94B0FD58, 0x6035B737EBF9E521, (97889, 532587)),
    ],
)
def test_vectors_of_tables_names(table, hashed, salted, rows):
    assert name64(table) == hashed
    assert salt(2021, hashed, 0) == salted
    salts = torch.tensor([table_salt(2021, table, chunk) for chunk in (0, 1)])
    assert hash_rows(torch.tensor([1]), salts, torch.tensor(1000003)).tolist() == list(rows)


@given(INT64, st.integers(0, 2**64 - 1), st.integers(1, 2**62))
def test_tensors_agree_with_integers(id_, salted, num_rows):
    row = hash_rows(
        torch.tensor([id_]), torch.tensor([to_signed(salted)]), torch.tensor([num_rows])
    )
    wanted = (splitmix64((id_ & (2**64 - 1)) ^ salted) & (2**63 - 1)) % num_rows
    assert row.tolist() == [wanted]


@given(st.integers(0, 2**64 - 1))
def test_signed_constants_keep_their_bits(x):
    assert to_signed(x) % 2**64 == x
    assert -(2**63) <= to_signed(x) < 2**63


def test_ids_are_left_as_they_came():
    ids = torch.arange(5)
    hash_rows(ids, torch.tensor([7]), torch.tensor([3]))
    assert ids.tolist() == [0, 1, 2, 3, 4]


def test_int32_ids_hash_as_int64_ones():
    ids = torch.tensor([-5, 0, 3, 2**31 - 1])
    args = (torch.tensor([to_signed(salt(1, 2, 3))]), torch.tensor([10**6]))
    assert torch.equal(hash_rows(ids.int(), *args), hash_rows(ids, *args))


def test_rows_are_uniform():
    """Chi-square over 64 rows: 63 degrees of freedom, deviation 11."""
    salts = torch.tensor([to_signed(salt(2021, 3, 0))])
    for ids in (torch.arange(64_000), torch.arange(64_000) * 4096, -torch.arange(64_000)):
        counts = torch.bincount(hash_rows(ids, salts, torch.tensor([64])), minlength=64)
        assert ((counts - 1000.0) ** 2 / 1000).sum() < 63 + 5 * 11.3


def test_features_and_chunks_are_independent():
    """Ids that share a row in one look-up share it in another no more often than chance."""
    ids, rows = torch.arange(20_000), torch.tensor([100])
    salts = [torch.tensor([to_signed(salt(1, f, c))]) for f, c in ((0, 0), (0, 1), (1, 0))]
    placed = [hash_rows(ids, s, rows) for s in salts]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        pairs = torch.bincount(placed[one] * 100 + placed[other], minlength=10_000)
        assert ((pairs - 2.0) ** 2 / 2).sum() < 9_999 + 6 * (2 * 9_999) ** 0.5


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
def test_compiled_code_hashes_alike():
    rows = [1, 2, 3, 1000, 2**31 - 1, 2**40 + 7, 2**63 - 1]
    salts = [table_salt(n, f"t{n}") for n in range(len(rows))]
    counts = [50 * n for n in range(len(rows))]
    ends = torch.tensor([-(2**63), 2**63 - 1, -1, 0])
    ids = torch.randint(-(2**63), 2**63 - 1, (sum(counts),))
    ids[:4] = ends
    wanted = [
        hash_rows(own, torch.tensor(salt), torch.tensor(size))
        for own, salt, size in zip(ids.split(counts), salts, rows)
    ]
    found = hash_each(ids, counts, np.array(salts), np.array(rows))
    assert torch.equal(found, torch.cat(wanted))
