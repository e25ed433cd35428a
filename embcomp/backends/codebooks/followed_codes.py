"""The codes of ids once ids are those of another dataset: those that they had, or those of the mean row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embcomp.backends.base import FollowInputs
from embcomp.backends.codebooks.bit_packing import (
    gather_bits,
    pack_bits,
    packed_bytes,
    unpack_bits,
)
from embcomp.backends.codebooks.vector_quantized import VectorQuantized, code_bytes, padded_codes
from embcomp.layers.block_work import RowBlock, add_up, row_blocks
from embcomp.layers.mapped_copy import MappedCopy
from embcomp.layers.row_sources import RowSource
from embcomp.tables.specs import TableSpec


def followed_codes(config: VectorQuantized, past: FollowInputs) -> RowSource:
    """The buffer of a `CodedRoute`, block by block.

    Args:
        config: the form, with codes.
        past: the earlier run's form, and where ids come from.
    """
    tables, layout, bits = past.tables, config.layout(past.tables), config.bits
    then = past.tables_before
    sizes = [code_bytes(t.num_embeddings * layout.positions(t), bits) for t in then]
    came: dict[str, _StoredCodes] = {}
    means: dict[str, Tensor] = {}
    blocks: list[RowBlock] = []
    for n, (table, packed) in enumerate(
        zip(tables, past.before.source("route.codes").split(sizes))
    ):
        positions = layout.positions(table)
        came[table.name] = _StoredCodes(packed, positions, bits)
        means[table.name] = torch.zeros(positions, dtype=torch.int64)
        if past.ids[table.name].has_open:
            means[table.name] = _codes_of_mean(config, past, n, came[table.name])
        blocks += row_blocks(table.name, table.num_embeddings, positions)
    lengths = {table.name: table.num_embeddings for table in tables}

    def moved(block: RowBlock) -> Tensor:
        before = past.ids[block.table].before.read(block.start, block.stop)
        codes = came[block.table].of(before.clamp(min=0))
        own = torch.where(before.unsqueeze(1) < 0, means[block.table], codes).reshape(-1)
        return pack_bits(torch.cat([own, own.new_zeros(codes_of(block) - len(own))]), bits)

    def codes_of(block: RowBlock) -> int:
        """A block's codes; those of a table end with a byte."""
        positions = len(means[block.table])
        if block.stop < lengths[block.table]:
            return len(block) * positions
        return padded_codes(block.stop * positions, bits) - block.start * positions

    own_sizes = [packed_bytes(codes_of(block), bits) for block in blocks]
    shape = (sum(own_sizes),)
    return past.work.write("followed-codes", moved, blocks, shape, torch.uint8, sizes=own_sizes)


class _StoredCodes:
    """A table's packed codes, of which some are read.

    Args:
        packed: (bytes,) uint8.
        positions: codes of an id.
        bits: of a code.
    """

    def __init__(self, packed: RowSource, positions: int, bits: int) -> None:
        self._packed, self._positions, self._bits = packed, positions, bits
        self._anywhere = MappedCopy(packed, "the codes of an earlier run")

    def of(self, ids: Tensor) -> Tensor:
        """(n, positions) int64 the codes of ids (n,) in any order."""
        index = (ids * self._positions).unsqueeze(1) + torch.arange(self._positions)
        return gather_bits(self._anywhere.tensor(), index, self._bits)

    def range(self, start: int, stop: int) -> Tensor:
        """(stop - start, positions) int64 the codes of a range of ids whose first is a multiple of 8."""
        first, count = start * self._positions * self._bits // 8, (stop - start) * self._positions
        packed = self._packed.read(first, first + packed_bytes(count, self._bits))
        return unpack_bits(packed, self._bits, count).view(-1, self._positions)


def _codes_of_mean(
    config: VectorQuantized, past: FollowInputs, place: int, came: _StoredCodes
) -> Tensor:
    """(positions,) int64 the codewords nearest to a table's mean row, each id counted as it occurs.

    Args:
        config: the form.
        past: the earlier run's form, and how often its ids occurred.
        place: the table's place in the group.
        came: its codes.
    """
    table, layout = past.tables_before[place], config.layout(past.tables)
    physical = config.codebook_tables(past.tables)[layout.unit_of(place)]
    words = past.before.rows(physical.name).whole().double().unflatten(0, (-1, config.codewords))
    shares = _shares(config, past, table, came)
    found = []
    for position, book in enumerate(layout.places(place)):
        mean = shares[position] @ words[book] / shares[position].sum()
        found.append(int((words[book] - mean).square().sum(1).argmin()))
    return torch.tensor(found)


def _shares(
    config: VectorQuantized, past: FollowInputs, table: TableSpec, came: _StoredCodes
) -> Tensor:
    """(positions, codewords) float64 how often each codeword stands in a row; unweighted without counts."""
    counts = past.ids[table.name].counts
    positions = config.layout(past.tables_before).positions(table)

    def uses(block: RowBlock) -> Mapping[str, Tensor]:
        codes = came.range(block.start, block.stop).t()
        weights = counts.read(block.start, block.stop).expand(positions, -1)
        none = torch.zeros(positions, config.codewords, dtype=torch.float64)
        plain = torch.ones_like(weights)
        return {
            "weighted": none.scatter_add(1, codes, weights),
            "plain": none.scatter_add(1, codes, plain),
        }

    blocks = row_blocks(table.name, table.num_embeddings, positions)
    found = add_up(past.work, f"code-uses-{table.name}", uses, blocks)
    return found["weighted"] if bool(found["weighted"].any()) else found["plain"]
