"""Rows by range are the rows of the tensor, whatever the source is made of."""

from __future__ import annotations

import pytest
import torch

from embcomp.layers import row_sources
from embcomp.layers.block_work import RowBlock, block_rows, row_blocks
from embcomp.layers.row_sources import ComputedRows, JoinedRows, MemoryRows

TABLE = torch.arange(3000.0).reshape(1000, 3)


def sources():
    memory = MemoryRows(TABLE)
    computed = ComputedRows(TABLE.shape, TABLE.dtype, lambda a, b: TABLE[a:b], of=[memory])
    parts = [memory.range(0, 10), computed.range(10, 10), computed.range(10, 999)]
    return {
        "memory": memory,
        "computed": computed,
        "joined": JoinedRows([*parts, memory.range(999, 1000)]),
        "range": JoinedRows([computed, memory]).range(0, 1000),
    }


@pytest.mark.parametrize("kind", sources())
def test_every_range_is_that_of_the_tensor(kind, monkeypatch):
    monkeypatch.setattr(row_sources, "_AT_ONCE", 12 * 64)
    source = sources()[kind]
    assert source.shape == TABLE.shape
    assert torch.equal(source.whole(), TABLE)
    for start, stop in ((0, 0), (0, 7), (9, 11), (500, 1000), (1000, 1000)):
        assert torch.equal(source.read(start, stop), TABLE[start:stop])
        assert torch.equal(source.range(start, stop).whole(), TABLE[start:stop])
    ids = torch.tensor([0, 1, 9, 10, 11, 300, 304, 998, 999])
    assert torch.equal(source.take(ids), TABLE[ids])
    assert torch.equal(source.range(5, 900).take(ids[:4]), TABLE[5:][ids[:4]])
    assert torch.equal(source.first_columns(2).read(3, 9), TABLE[3:9, :2])
    halves = source.split([400, 0, 600])
    assert [len(half) for half in halves] == [400, 0, 600]
    assert torch.equal(halves[2].read(0, 5), TABLE[400:405])


def test_blocks_follow_from_the_width_alone():
    assert block_rows(16) == 1 << 16
    assert block_rows(1 << 20) == 256
    assert block_rows(17) == 1 << 15
    blocks = row_blocks("t", 200_000, 16)
    assert blocks[0] == RowBlock(table="t", start=0, stop=65536)
    assert [len(block) for block in blocks] == [65536, 65536, 65536, 200_000 - 3 * 65536]
    assert row_blocks("t", 0, 16) == []
    inner = row_blocks("t", 200_000, 16, start=5, stop=70_000)
    assert [block.rows for block in inner] == [slice(5, 65541), slice(65541, 70_000)]
