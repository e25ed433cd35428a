"""Some ids of a table in bits: which they are, and where they come, in both directions."""

from __future__ import annotations

import pytest
import torch

from embcomp.layers import kept_ids
from embcomp.layers.kept_ids import KeptIds
from embcomp.layers.row_sources import as_rows


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6, 1.0])
def test_bits_say_what_a_list_of_ids_says(count, share, monkeypatch):
    monkeypatch.setattr(kept_ids, "_AT_ONCE", 512)
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < share
    kept, wanted = KeptIds.of(as_rows(mask)), mask.nonzero()[:, 0]
    assert len(kept) == len(wanted) and kept.num_ids == count
    ids = torch.arange(count).flip(0)
    places = torch.where(mask, mask.long().cumsum(0) - 1, -1)
    assert torch.equal(kept.places(ids), places.flip(0))
    for start, stop in ((0, count), (count // 3, count // 2), (count, count)):
        assert torch.equal(kept.mask(start, stop), mask[start:stop])
    for start, stop in ((0, len(wanted)), (len(wanted) // 3, len(wanted) // 2)):
        assert torch.equal(kept.ids(start, stop), wanted[start:stop])
    for first in range(0, count + 256, 256):
        assert kept.before(first) == int(mask[:first].sum())
