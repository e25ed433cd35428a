"""Rows as they are read from a source, and how far compressed ones are from them."""

from __future__ import annotations

import pytest
import torch

from embcomp import DataError
from embcomp.compressing.approximation_error import measure
from embcomp.compressing.found_tensors import CheckedRows, first_odd_row
from embcomp.layers.block_work import IN_MEMORY
from embcomp.layers.row_sources import MemoryRows
from embcomp.tables.specs import TableSpec


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_no_number_is_named_however_it_is_read(odd):
    rows = torch.randn(900, 4)
    rows[700, 2] = odd
    source = CheckedRows("t", MemoryRows(rows), torch.full((900, 1), 2.0))
    assert torch.equal(source.read(5, 600), 2 * rows[5:600])
    assert torch.equal(source.take(torch.tensor([3, 899])), 2 * rows[[3, 899]])
    for read in (lambda: source.read(650, 720), lambda: source.take(torch.tensor([1, 700, 800]))):
        with pytest.raises(DataError, match="t: row 700 holds NaN or an infinity"):
            read()


def test_rows_whose_sum_is_beyond_float32_are_numbers_all_the_same():
    rows = torch.full((8, 4), 3e38)
    assert first_odd_row(rows) is None
    rows[6, 1], rows[7, 1] = torch.inf, -torch.inf
    assert first_odd_row(rows) == 6


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_error_of_rows_of_any_size_is_that_of_their_numbers(size):
    torch.manual_seed(0)
    rows, moved = torch.randn(700, 8), torch.randn(700, 8)
    now = (rows + 0.1 * moved) * size
    table = TableSpec(name="t", num_embeddings=700, embedding_dim=8, feature_names=("t",))
    counts = torch.arange(700)
    found = measure(
        table,
        MemoryRows(rows * size),
        lambda name, ids: now[ids],
        counts=counts,
        work=IN_MEMORY,
    )
    lost = (counts * (0.1 * moved.double()).square().sum(1)).sum()
    whole = (counts * rows.double().square().sum(1)).sum()
    assert found.error == pytest.approx(float((lost / whole).sqrt()), rel=1e-4)
    assert found.worst_row == int(moved.square().sum(1).argmax())
    assert found.worst_error == pytest.approx(size * 0.1 * float(moved.norm(dim=1).max()), rel=1e-4)
