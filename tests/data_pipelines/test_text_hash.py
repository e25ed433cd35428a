"""The hash of texts is what its definition says, on any machine and with any version of polars."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, strategies as st

from embcomp.data_pipelines.preparing.counting import cut_by_hash
from embcomp.data_pipelines.preparing.text_hash import GAMMA, MIX_1, MIX_2, hash_texts

WORD = 2**64

VECTORS = [
    ("", 0, 0x97F9F256D5FA9085),
    ("a", 0, 0x8BA586AF86C766C3),
    ("68fd1e64", 0, 0xA731000754E880FE),
    ("68fd1e64", 1, 0x10294E1DF945A5F4),
    ("twelve bytes", 0, 0x3061CB7BCA853E02),
    ("thirteen more", 0, 0x3345106FD9113D93),
    ("é€𝄞", 3, 0xE249162CA92BD512),
    ("https://example.org/a/long/path?with=arguments", 0, 0x3736439F6ADABB14),
]


def reference(text: str, seed: int) -> int:
    """The definition, byte by byte."""
    raw = text.encode()
    message = len(raw).to_bytes(4, "little") + raw
    message += bytes(-len(message) % 8)
    message += bytes(max(0, 16 - len(message)))
    h = (seed + 1) * GAMMA % WORD
    for at in range(0, len(message), 8):
        h = (h ^ int.from_bytes(message[at : at + 8], "little")) * MIX_1 % WORD
        h ^= h >> 32
    h = h * MIX_2 % WORD
    return h ^ h >> 29


@pytest.mark.parametrize(("text", "seed", "expected"), VECTORS)
def test_stored_vectors_never_change(text, seed, expected):
    assert hash_texts(pl.Series([text]), seed).tolist() == [expected]


@given(st.lists(st.text(max_size=40) | st.none()), st.integers(0, 3))
def test_every_text_gets_what_the_definition_says(texts, seed):
    found = hash_texts(pl.Series(texts, dtype=pl.String), seed).tolist()
    wanted = [None if text is None else reference(text, seed) for text in texts]
    assert [h if w is not None else None for h, w in zip(found, wanted)] == wanted


def test_slices_and_chunks_of_a_column_hash_as_the_whole():
    texts = [f"{i}" * (i % 9) for i in range(20_000)]
    whole = hash_texts(pl.Series(texts), 0)
    chunked = pl.concat([pl.Series(texts[:7]), pl.Series(texts[7:])], rechunk=False)
    assert (hash_texts(chunked, 0) == whole).all()
    assert (hash_texts(pl.Series(texts).slice(5, 900), 0) == whole[5:905]).all()


def test_values_are_spread_evenly_over_partitions_and_high_bits():
    texts = pl.Series([f"{i:08x}" for i in range(50_000)])
    hashes = hash_texts(texts, 0)
    assert len(np.unique(hashes)) == len(texts)
    for cells in (hashes % np.uint64(50), hashes >> np.uint64(58)):
        sizes = np.bincount(cells.astype(np.int64))
        # The deviation of a uniform draw is the root of the mean; six of them is never seen.
        assert abs(sizes - sizes.mean()).max() < 6 * sizes.mean() ** 0.5


def test_a_partition_holds_the_values_whose_hash_names_it():
    counts = pl.DataFrame({"value": [f"v{i}" for i in range(100)], "count": range(100)})
    parts = cut_by_hash(counts, 7)
    assert sorted(pl.concat(parts).rows()) == sorted(counts.rows())
    for number, part in enumerate(parts):
        assert all(reference(value, 1) % 7 == number for value in part["value"])
