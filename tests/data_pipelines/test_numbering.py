"""Values are numbered as they come, and counted, whatever their bytes."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from embcomp.data_pipelines.numbering import Numbering, can_number

pytestmark = pytest.mark.skipif(not can_number(), reason="no compiler: values cannot be numbered")

TEXTS = st.one_of(
    st.none(),
    st.text("ab", max_size=3),
    st.text(max_size=14),
    st.text("x", min_size=11, max_size=40),
    st.integers(0, 2000).map(lambda n: f"{n:08x}"),
)


def reference(blocks):
    numbers, counts, found = {}, [], []
    for block in blocks:
        of_block = []
        for text, is_counted in block:
            if text is None:
                of_block.append(0)
                continue
            if text not in numbers:
                numbers[text] = len(numbers) + 1
                counts.append(0)
            counts[numbers[text] - 1] += is_counted
            of_block.append(numbers[text])
        found.append(of_block)
    return found, list(numbers), counts


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(TEXTS, st.booleans()), max_size=200), max_size=4), st.integers(0, 9)
)
def test_numbers_and_counts_are_those_of_a_dictionary(blocks, start):
    numbering = Numbering()
    wanted, texts, counts = reference(blocks)
    for block, of_block in zip(blocks, wanted):
        # A slice of a longer column: views and bits then do not begin where their buffers do.
        column = pl.Series([*["before"] * start, *(text for text, _ in block)], dtype=pl.String)
        counted = np.array([is_counted for _, is_counted in block], dtype=bool)
        numbers = numbering.number(column.slice(start))
        assert numbers.tolist() == of_block
        numbering.count(numbers, counted)
    values, found = numbering.values()
    assert values.to_pylist() == texts
    assert found.tolist() == counts
    assert len(numbering) == len(texts)


def test_many_values_keep_their_numbers_as_room_grows():
    numbering = Numbering()
    column = pl.Series([f"value {n * 7919 % 200_003} of many" for n in range(200_003)])
    empty = numbering.bytes
    everything = np.ones(len(column), dtype=bool)
    first = numbering.number(column)
    assert first.tolist() == list(range(1, 200_004))
    again = numbering.number(column.reverse())
    assert np.array_equal(again[::-1], first)
    for numbers in (first, again):
        numbering.count(numbers, everything)
    values, counts = numbering.values()
    assert values.to_pylist() == column.to_list()
    assert counts.tolist() == [2] * 200_003
    assert numbering.bytes > empty + 200_003 * 24


def test_a_block_is_numbered_while_the_one_before_is_counted():
    numbering = Numbering()
    blocks = [
        pl.Series([f"{n * block}" for n in range(3000)], dtype=pl.String) for block in range(1, 25)
    ]
    numbers = [numbering.number(blocks[0])]
    with ThreadPoolExecutor(1) as pool:
        for n in range(len(blocks)):
            coming = pool.submit(numbering.number, blocks[n + 1]) if n + 1 < len(blocks) else None
            numbering.count(numbers[n], np.ones(len(numbers[n]), dtype=bool))
            if coming is not None:
                numbers.append(coming.result())
    values, counts = numbering.values()
    expected = Counter(value for block in blocks for value in block.to_list())
    assert dict(zip(values.to_pylist(), counts.tolist())) == expected
    numbering.close()
    with pytest.raises(ValueError, match="let go of"):
        numbering.number(blocks[0])
