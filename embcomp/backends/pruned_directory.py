"""Which ids of tables are kept, as a `PrunedRoute` stores it: written, and read again, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from embcomp.backends.base import MethodState
from embcomp.layers.block_work import RowBlock, Work, row_blocks
from embcomp.layers.pruned_route import WORDS, num_blocks, pack, unpack
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.specs import TableSpec

_BLOCK = 64 * WORDS  # ids


def mask_blocks(table: TableSpec) -> list[RowBlock]:
    """The blocks in which a table's rows are kept or dropped."""
    return row_blocks(table.name, table.num_embeddings, table.embedding_dim)


def kept_by_block(
    tables: Sequence[TableSpec], masks: Mapping[str, RowSource], work: Work
) -> dict[str, list[int]]:
    """For each table, how many ids each of its blocks keeps.

    Args:
        tables: some tables.
        masks: for each, (num_embeddings,) bool.
        work: does it.
    """
    blocks = [block for table in tables for block in mask_blocks(table)]
    counts: dict[str, list[int]] = {table.name: [] for table in tables}

    def count(block: RowBlock) -> dict[str, Tensor]:
        return {"kept": masks[block.table].read(block.start, block.stop).sum()}

    for block, found in zip(blocks, work.map("kept", count, blocks)):
        counts[block.table].append(int(found["kept"]))
    return counts


def directory(
    tables: Sequence[TableSpec],
    masks: Mapping[str, RowSource],
    counts: Mapping[str, Sequence[int]],
    work: Work,
) -> dict[str, Tensor | RowSource]:
    """The buffers of a `PrunedRoute`.

    Args:
        tables: those that are pruned, in the order of their names.
        masks: for each, (num_embeddings,) bool.
        counts: for each, how many ids each of its blocks keeps.
        work: does it.
    """
    blocks = [block for table in tables for block in mask_blocks(table)]
    before = {
        (block.table, block.start): kept
        for table in tables
        for block, kept in zip(mask_blocks(table), accumulate(counts[table.name], initial=0))
    }
    sizes = [num_blocks(len(block)) for block in blocks]

    def words(block: RowBlock) -> Tensor:
        return pack(masks[block.table].read(block.start, block.stop))[0]

    def heads(block: RowBlock) -> Tensor:
        own = pack(masks[block.table].read(block.start, block.stop))[1]
        return own + before[block.table, block.start]

    shape = (sum(sizes), WORDS)
    return {
        "route.words": work.write("words", words, blocks, shape, torch.int64, sizes=sizes),
        "route.counts": work.write("counts", heads, blocks, shape[:1], torch.int32, sizes=sizes),
    }


@dataclass(frozen=True, kw_only=True)
class KeptBits:
    """Which ids of a table are kept, to be read by range.

    Attributes:
        words: (blocks, 4) int64 bits of 256 ids each.
        counts: (blocks,) int32 kept ids before each block.
        num_ids: of the table.
    """

    words: RowSource
    counts: RowSource
    num_ids: int

    def read(self, start: int, stop: int) -> Tensor:
        """(stop - start,) bool which ids of a range are kept."""
        first, end = start // _BLOCK, num_blocks(stop)
        ids = min(_BLOCK * end, self.num_ids) - _BLOCK * first
        return unpack(self.words.read(first, end), ids)[start - _BLOCK * first :][: stop - start]

    def places(self, start: int, stop: int) -> Tensor:
        """(stop - start,) int64 how many kept ids there are below each of a range, for kept ones; else -1."""
        first = start // _BLOCK * _BLOCK
        kept = self.read(first, stop)
        before = int(self.counts.read(first // _BLOCK, first // _BLOCK + 1))
        return torch.where(kept, kept.long().cumsum(0) + (before - 1), -1)[start - first :]


def kept_bits(tables: Sequence[TableSpec], form: MethodState) -> dict[str, KeptBits]:
    """What a form's `PrunedRoute` knows.

    Args:
        tables: those that are pruned, in the order of their names.
        form: it.
    """
    if not tables:
        return {}
    blocks = [num_blocks(table.num_embeddings) for table in tables]
    words = form.source("route.words").split(blocks)
    counts = form.source("route.counts").split(blocks)
    return {
        table.name: KeptBits(words=own, counts=before, num_ids=table.num_embeddings)
        for table, own, before in zip(tables, words, counts)
    }


def pruned_of(bits: KeptBits) -> RowSource:
    """(num_embeddings,) bool which ids of a table are not kept."""
    return ComputedRows((bits.num_ids,), torch.bool, lambda a, b: ~bits.read(a, b))


def rows_of(bits: KeptBits, shared: int) -> RowSource:
    """(num_embeddings,) int64 the row of each id.

    Args:
        bits: which ids have rows of their own.
        shared: the row of all others.
    """

    def read(start: int, stop: int) -> Tensor:
        places = bits.places(start, stop)
        return torch.where(places < 0, shared, places)

    return ComputedRows((bits.num_ids,), torch.int64, read)
