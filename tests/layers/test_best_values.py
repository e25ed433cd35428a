"""The best of many values are those of a stable sort, however many blocks they are read in."""

from __future__ import annotations

import pytest
import torch

from embcomp.layers import block_work
from embcomp.layers.best_values import BestValues
from embcomp.layers.block_work import IN_MEMORY
from embcomp.layers.row_sources import MemoryRows


def tables_of(kind: str) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    values = {
        name: torch.rand(shape, generator=random, dtype=torch.float64) ** 9
        for name, shape in (("a", (700,)), ("b", (1,)), ("c", (600, 2)), ("d", (300,)))
    }
    if kind == "ties":
        values = {name: (each * 40).floor() / 40 for name, each in values.items()}
    if kind == "alike":
        values = {name: torch.ones_like(each) for name, each in values.items()}
    if kind == "single":
        values = {name: each.float() for name, each in values.items()}
    values["d"][::3] = -torch.inf
    return values


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("kind", ["different", "ties", "alike", "single"])
def test_the_best_are_those_of_a_stable_sort(kind, blocks, monkeypatch):
    if blocks > 1:
        monkeypatch.setattr(block_work, "BLOCK_BYTES", 1)
    values = tables_of(kind)
    best = BestValues(IN_MEMORY, "x", {name: MemoryRows(each) for name, each in values.items()})
    flat = torch.cat([each.reshape(-1).double() for each in values.values()])
    order = flat.sort(descending=True, stable=True).indices
    assert best.most == (flat > -torch.inf).sum() == 2101
    for count in (0, 1, 2, 400, 1000, 1999, 2101, 5000):
        cut = best.cut(lambda counts, count=count: sum(counts.values()) <= count)
        wanted = torch.zeros(len(flat), dtype=torch.bool)
        wanted[order[: min(count, best.most)]] = True
        found = {name: mask.whole() for name, mask in best.kept(cut).items()}
        assert torch.equal(torch.cat([mask.reshape(-1) for mask in found.values()]), wanted)
        assert cut.counts == {name: int(mask.sum()) for name, mask in found.items()}
    assert best.cut(lambda counts: False) is None


def test_a_cut_stops_before_what_does_not_fit():
    values = {"a": torch.tensor([4.0, 1.0, 3.0]), "b": torch.tensor([5.0, 2.0])}
    best = BestValues(IN_MEMORY, "x", {name: MemoryRows(each) for name, each in values.items()})
    cut = best.cut(lambda counts: counts["a"] * 10 + counts["b"] <= 22)
    assert cut.counts == {"a": 2, "b": 2}
    assert cut.value == 1.0
