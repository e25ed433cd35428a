"""Rows that follow their ids into another dataset: in bounded memory, alike on any number of ranks."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from embcomp.data_pipelines import followed_values
from embcomp.data_pipelines.followed_values import NEW, NOT_USED, follow_values, moved_values
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing.lookup import BYTES_PER_VALUE
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.layers import block_work, row_sources
from embcomp.layers.block_work import LEAST_ROWS
from tests.helpers.follow_cases import CASES, follow, follow_on_ranks
from tests.helpers.handover_cases import BLOCK, CountedBytes
from tests.helpers.raw_logs import vocabulary


@pytest.mark.parametrize("stand_in", [-1, 1])
@pytest.mark.parametrize("case", CASES)
def test_no_method_reads_more_than_a_block_of_anything_as_long_as_a_table(
    case, stand_in, monkeypatch
):
    wanted = follow(case, stand_in=stand_in)
    monkeypatch.setattr(block_work, "BLOCK_BYTES", 1)
    monkeypatch.setattr(block_work, "_ROWS_AVERAGED", LEAST_ROWS)
    monkeypatch.setattr(row_sources, "_AT_ONCE", BLOCK)
    monkeypatch.setattr(CountedBytes, "most", 0)
    counted = follow(case, wrap=CountedBytes, stand_in=stand_in)
    assert 0 < CountedBytes.most <= BLOCK
    means = {name for name in wanted if stand_in < 0 and name.startswith("rows.")}
    for name, found in counted.items():
        if name not in means:  # sums of other blocks, which may differ in their last digit
            assert found == wanted[name], name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_follow_what_one_process_does_to_the_bit(case, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(block_work, "BLOCK_BYTES", 1)
    wanted = follow(case)
    for ranks, memory in ((1, 64 << 20), (3, 1 << 30)):
        found = workers.run(ranks, follow_on_ranks, case, tmp_path / str(ranks), memory)
        assert found == [wanted] * ranks, ranks


@pytest.fixture
def days(tmp_path):
    """Two datasets: values of the first come back in another order, beside new ones."""
    (tmp_path / "d.yaml").write_text("{name: d, label: y, categorical: [c]}")
    for day in (0, 1):
        values = [f"v{(7 * n) % (101 + 30 * day)}" for n in range(600) for _ in range(1 + n % 3)]
        frame = pl.DataFrame({"y": [n % 2 for n in range(len(values))], "c": values})
        frame.slice(90 * day).write_csv(tmp_path / f"{day}.csv")
        prepare(
            tmp_path / f"{day}.csv",
            tmp_path / f"day{day}",
            importer="table",
            schema=tmp_path / "d.yaml",
        )
    return [DatasetInfo.load(tmp_path / f"day{day}") for day in (0, 1)]


@pytest.mark.slow
def test_values_are_followed_whatever_part_of_a_vocabulary_is_indexed_at_once(days, monkeypatch):
    earlier, today = days
    feature = today.categorical[0]
    there, here = (dict(vocabulary(info, "c").select("value", "id").iter_rows()) for info in days)
    wanted = np.full(feature.num_embeddings, NOT_USED)
    wanted[:2] = 0, 1
    for value, own in here.items():
        wanted[own] = there.get(value, NEW)
    assert {NEW, 0, 1} < set(wanted.tolist())
    sizes = []

    class Index(followed_values.ValueIndex):
        def __init__(self, path, start, stop):
            sizes.append(stop - start)
            super().__init__(path, start, stop)

    monkeypatch.setattr(followed_values, "ValueIndex", Index)
    found = []
    for at_once in (1000, 40, 1):
        sizes.clear()
        before = np.zeros(feature.num_embeddings, dtype=np.int64)
        found.append(follow_values(earlier, today, "c", before, at_once * BYTES_PER_VALUE))
        assert max(sizes) <= at_once and sum(sizes) == len(there)
        assert np.array_equal(before, wanted)
        moved = sum(own != there.get(value, own) for value, own in here.items())
        assert moved_values(earlier, today, "c", at_once * BYTES_PER_VALUE) == moved > 0
    assert found == [found[0]] * 3
    assert found[0].kept == len(there.keys() & here.keys())
    assert (found[0].new, found[0].retired) == (
        len(here) - found[0].kept,
        len(there) - found[0].kept,
    )
