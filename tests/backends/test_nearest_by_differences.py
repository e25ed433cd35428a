"""Nearest means nearest, the first of equals, however distances are cut into blocks."""

from __future__ import annotations

import pytest
import torch

from embcomp.backends.codebooks.nearest import nearest
from embcomp.backends.codebooks.nearest_by_differences import (
    FEW_KERNELS,
    Tiling,
    nearest_by_differences,
)
from tests.helpers.dispatched import Dispatched


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nearest_is_what_a_full_search_finds():
    vectors, codebooks = drawn(400, 5, 3), drawn(3, 33, 3, seed=1)
    which = torch.tensor([0, 2, 1, 0, 2])
    codes = nearest_by_differences(vectors, codebooks, which)
    for column, book in enumerate(which):
        distances = (vectors[:, column, None].double() - codebooks[book].double()).square().sum(-1)
        at_code = distances.gather(1, codes[:, column : column + 1])[:, 0]
        torch.testing.assert_close(at_code, distances.amin(1), rtol=1e-5, atol=1e-9)
    alone = [nearest_by_differences(vectors[n : n + 1], codebooks, which) for n in range(50)]
    assert torch.equal(torch.cat(alone), codes[:50])


TILINGS = [FEW_KERNELS, Tiling(distances=1), Tiling(distances=9000, operations=40)]


@pytest.mark.parametrize("size", [(700, 3, 40, 2), (1, 1, 2, 5), (130, 4, 300, 3), (3, 2, 2000, 2)])
def test_blocks_change_nothing(size):
    rows, columns, count, dim = size
    # On a grid: many distances are equal.
    vectors = drawn(rows, columns, dim).mul(2).round()
    codebooks = drawn(2, count, dim, seed=1).mul(2).round()
    which = torch.arange(columns) % 2
    gaps = (vectors[:, :, None] - codebooks[which]).square().sum(3)
    wanted = gaps.argmin(2)
    for tiling in TILINGS:
        assert torch.equal(nearest_by_differences(vectors, codebooks, which, tiling=tiling), wanted)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("size", [(5, 1, 2, 2), (4096, 104, 256, 2), (10**6, 26, 65536, 16)])
def test_blocks_hold_what_they_may(tiling, size):
    rows, columns, count, axes = size
    high, wide = tiling.sizes(*size)
    assert 1 <= wide <= columns and high >= 1
    held = min(high, rows) * wide * count
    bound = max(tiling.distances, 128 * count)  # a register's width of rows is taken in any case
    if tiling.operations is None:
        assert held <= bound
    else:
        number = -(-rows // high) * -(-columns // wide)
        assert held <= bound or number * (3 * axes + 4) <= max(tiling.operations, 3 * axes + 4)


@pytest.mark.parametrize("rows", [100, 4096, 65536, 10**6])
@pytest.mark.parametrize("dim", [1, 2, 8, 16])
def test_few_operations_are_dispatched_elsewhere_than_on_a_cpu(rows, dim):
    vectors = torch.empty(rows, 104, dim, device="meta")
    codebooks = torch.empty(104, 256, dim, device="meta")
    with Dispatched() as seen:
        nearest(vectors, codebooks, torch.empty(104, dtype=torch.int64, device="meta"))
    assert seen.total <= 120
