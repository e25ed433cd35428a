"""Hand-overs on the owners of rows: alike on any number of ranks, in bounded memory, gone on with."""

from __future__ import annotations

import multiprocessing

import pytest

from embcomp.backends.codebooks.pq import PQ
from embcomp.backends.widths.optembed import OptEmbed
from embcomp.config.train_config import parse_config
from embcomp.errors import ConfigError
from embcomp.layers import block_work, row_sources
from tests.helpers.handover_cases import (
    BIG,
    BLOCK,
    CASES,
    CountedBytes,
    CountedWork,
    digest,
    extra_memory,
    hand_over,
    hand_over_killed,
    hand_over_on_ranks,
)
from tests.helpers.long import long_but


@pytest.mark.parametrize("case", CASES)
def test_no_method_reads_more_than_a_block(case, monkeypatch):
    monkeypatch.setattr(block_work, "BLOCK_BYTES", 1)
    monkeypatch.setattr(CountedBytes, "most", 0)
    counted = hand_over(CASES[case], wrap=CountedBytes)
    assert CountedBytes.most <= BLOCK
    assert digest(counted) == digest(hand_over(CASES[case]))


@pytest.mark.parametrize("case", long_but(["cce", "cce again"], CASES))
def test_what_a_method_makes_of_rows_is_not_held_whole_either(case, monkeypatch):
    monkeypatch.setattr(block_work, "BLOCK_BYTES", 1)
    monkeypatch.setattr(row_sources, "_AT_ONCE", BLOCK)
    monkeypatch.setattr(CountedBytes, "most", 0)
    counted = hand_over(CASES[case], work=CountedWork(), wrap=CountedBytes)
    assert CountedBytes.most <= BLOCK
    assert digest(counted) == digest(hand_over(CASES[case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_hand_over_what_one_process_does_to_the_bit(case, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(block_work, "BLOCK_BYTES", 1)
    wanted = digest(hand_over(CASES[case]))
    for ranks, memory in ((1, 64 << 20), (2, 1 << 30), (4, 64 << 20)):
        found = workers.run(ranks, hand_over_on_ranks, case, tmp_path / str(ranks), memory)
        assert [each for each, _ in found] == [wanted] * ranks, ranks


@pytest.mark.slow
@pytest.mark.parametrize("case", long_but(["pq"], ["pq", "dnis elements", "optembed"]))
def test_a_killed_hand_over_goes_on_from_the_last_finished_block(case, workers, tmp_path):
    ((wanted, pieces),) = workers.run(1, hand_over_on_ranks, case, tmp_path / "whole", 64 << 20)
    for after, ranks in ((pieces // 3, 2), (pieces - 1, 4)):
        folder = tmp_path / f"{after}"
        context = multiprocessing.get_context("spawn")
        killed = context.Process(target=hand_over_killed, args=(case, folder, after))
        killed.start()
        killed.join()
        assert killed.exitcode == -9
        found = workers.run(ranks, hand_over_on_ranks, case, folder, 64 << 20)
        assert [each for each, _ in found] == [wanted] * ranks
        assert sum(made for _, made in found) == pieces - after


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stage"),
    [
        (PQ(subvector_dim=4, num_codewords=4), "codes"),
        (OptEmbed(), "retrain"),
    ],
)
def test_a_hand_over_takes_less_than_a_quarter_of_the_table_and_its_buffer(method, stage, tmp_path):
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    child = context.Process(target=extra_memory, args=(method, stage, tmp_path, found))
    child.start()
    extra = found.get(timeout=200)
    child.join()
    assert 0 < extra <= BIG[0] * BIG[1] * 4 // 4 + (64 << 20)


def test_the_memory_of_a_hand_over_is_a_number_of_bytes():
    document = {
        "name": "x",
        "data": {"path": "x"},
        "tables": {"method": "full"},
        "model": {"name": "lr"},
    }
    assert parse_config(document).train.handover_memory == "256MiB"
    assert parse_config(document, ["train.handover_memory=1GiB"]).train.handover_memory == "1GiB"
    for wrong in ("10%", "63MiB", "0", "-1", "much"):
        with pytest.raises(ConfigError, match="handover_memory: expected .* number of bytes"):
            parse_config(document, [f"train.handover_memory={wrong}"])
