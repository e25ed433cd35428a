"""A failure on one rank is told whole, and soon."""

from __future__ import annotations

import os
import time

import pytest
import torch.distributed as dist

from embcomp.testing import RanksFailed, WorkerPool

pytestmark = pytest.mark.slow


def rank_and_size(extra):
    return dist.get_rank(), dist.get_world_size(), extra


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def test_results_come_by_rank_for_any_world_size(workers):
    for world_size in (2, 1, 4, 2):
        wanted = [(rank, world_size, "x") for rank in range(world_size)]
        assert workers.run(world_size, rank_and_size, "x") == wanted


def test_world_sizes_beyond_the_pool_are_refused(workers):
    for world_size in (0, 5):
        with pytest.raises(ValueError, match=rf"in \[1, 4\], got {world_size}"):
            workers.run(world_size, rank_and_size, "x")


def test_every_rank_is_heard_when_one_fails_or_dies():
    with WorkerPool(size=2) as pool:
        pool.run(2, rank_and_size, "started")
        before = time.monotonic()
        with pytest.raises(RanksFailed, match="2 of 2 ranks failed") as error:
            pool.run(2, fail_on_rank_1)
        assert time.monotonic() - before < 20
        assert "KeyError: 'the reason'" in str(error.value)
        assert "in fail_on_rank_1" in str(error.value)
        with pytest.raises(RanksFailed, match="died without a word"):
            pool.run(1, os._exit, 3)
