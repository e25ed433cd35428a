"""Rows that pass while structures are searched, in a bit for each."""

from __future__ import annotations

import pytest
import torch

from embcomp.backends.widths import fixed_rows
from embcomp.backends.widths.fixed_rows import FixedRows
from tests.helpers.handover_cases import CountedRows


@pytest.mark.parametrize("sizes", [(1,), (8, 3), (100, 1, 57, 16)])
def test_ids_pass_where_the_masks_say_so(sizes, monkeypatch):
    monkeypatch.setattr(fixed_rows, "_AT_ONCE", 16)
    monkeypatch.setattr(CountedRows, "most_rows", 0)
    random = torch.Generator().manual_seed(len(sizes))
    masks = [torch.rand(size, generator=random) < 0.5 for size in sizes]
    rows = FixedRows([CountedRows(mask) for mask in masks])
    assert CountedRows.most_rows <= 16
    for table, mask in enumerate(masks):
        found = rows.pass_(torch.arange(len(mask)), torch.tensor(table))
        assert found.dtype == torch.bool and torch.equal(found, mask)
    ids = torch.stack([torch.randint(size, (9,), generator=random) for size in sizes], dim=1)
    wanted = torch.stack([mask[ids[:, n]] for n, mask in enumerate(masks)], dim=1)
    assert torch.equal(rows.pass_(ids, torch.arange(len(sizes))), wanted)
