"""From ids to the rows that pruning left: a bit per id, and a count per 256 of them.

The row of a kept id is the number of kept ids before it: the count at the head of its block, and
the set bits of the block before its own. That takes `N / 8 + N / 64` bytes for `N` ids, where a
list of rows would take `4 N`. All arithmetic is on int64, so ids above 2**24 stay exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.layers.constant_tensors import Constant
from embcomp.layers.derived_tensors import Derived
from embcomp.layers.fused_lookups import FusedRoutes, IdRoute, OwnRow, RankedRow
from embcomp.layers.routing import common_count, per_value, renamed
from embcomp.layers.row_exchange import RowPlaces
from embcomp.layers.shardable_buffers import ShardableBuffers
from embcomp.tables.footprint import TensorFootprint

_BLOCK = 256  # ids
WORDS = _BLOCK // 64
"""Words of the bits of 256 ids."""
_BLOCK_BYTES = _BLOCK // 8 + 4


def num_blocks(num_embeddings: int) -> int:
    """Blocks of 256 ids that a table takes."""
    return -(-num_embeddings // _BLOCK)


def directory_bytes(num_embeddings: int) -> int:
    """Bytes of the bits and counts of one table."""
    return num_blocks(num_embeddings) * _BLOCK_BYTES


def directory_footprint(table: str, num_embeddings: int) -> tuple[TensorFootprint, ...]:
    """The bits and counts of one table, as a method bills them."""
    return tuple(
        TensorFootprint(
            name=f"{table}.{part}",
            role="mask",
            rows=num_blocks(num_embeddings),
            columns=columns,
            itemsize=itemsize,
            train_columns=columns,
            lookup=False,
        )
        for part, columns, itemsize in (("words", WORDS, 8), ("counts", 1, 4))
    )


def pack(kept: Tensor) -> tuple[Tensor, Tensor]:
    """The bits and counts of one table.

    Args:
        kept: (N,) bool, on the CPU.

    Returns:
        (blocks, 4) int64 words, the lowest bit for the lowest id; (blocks,) int32 kept ids before
        each block.
    """
    blocks = num_blocks(len(kept))
    bits = np.zeros(blocks * _BLOCK, dtype=np.bool_)
    bits[: len(kept)] = kept.numpy()
    words = np.packbits(bits, bitorder="little").view("<i8").astype(np.int64)
    per_block = bits.reshape(blocks, _BLOCK).sum(axis=1, dtype=np.int64)
    counts = (np.cumsum(per_block) - per_block).astype(np.int32)
    return torch.from_numpy(words.reshape(blocks, WORDS)), torch.from_numpy(counts)


def unpack(words: Tensor, num_embeddings: int) -> Tensor:
    """Which ids of one table are kept: (N,) bool from (blocks, 4) int64 words."""
    packed = words.cpu().contiguous().numpy().astype("<i8").view(np.uint8).reshape(-1)
    bits = np.unpackbits(packed, count=num_embeddings, bitorder="little")
    return torch.from_numpy(bits.astype(np.bool_))


class PrunedRoute(ShardableBuffers):
    """Sends kept ids to rows of their own and pruned ids to the row behind those.

    Until it is told otherwise, a pruned table keeps its first ids: the most frequent ones where
    ids are ranked by frequency.

    Args:
        keys: names of the look-ups, one for each (table, feature).
        owners: for each look-up, its table.
        num_embeddings: ids of each pruned table by name, in the order of the buffers. Ids of other
            tables are rows already.
        kept: rows of each pruned table, without the shared one.
        check: refuses ids that are out of range.
    """

    words: Tensor
    counts: Tensor

    def __init__(
        self,
        keys: Sequence[str],
        owners: Sequence[str],
        num_embeddings: Mapping[str, int],
        kept: Mapping[str, int],
        check: nn.Module,
    ) -> None:
        super().__init__()
        self.check = check
        self._keys, self._owners = list(keys), list(owners)
        self._sizes = [(n, kept[table]) for table, n in num_embeddings.items()]
        self._shared = Constant([kept.get(owner, 0) for owner in owners])
        self._all_pruned = all(owner in num_embeddings for owner in owners)
        parts = [(table, num_blocks(n)) for table, n in num_embeddings.items()]
        self.store_by_table("words", parts)
        self.store_by_table("counts", parts)
        total = sum(blocks for _, blocks in parts)
        self.register_buffer("words", torch.zeros(total, WORDS, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(total, dtype=torch.int32))
        self._derived = Derived()
        self.places_changed()

    @override
    def places_changed(self) -> None:
        parts = {part.table: part for part in self.held_parts("words")}
        starts = {table: part.start for table, part in parts.items()}
        # An unpruned table's look-ups read some block too, and what they find is not used.
        self._starts = Constant([starts.get(owner, -1) for owner in self._owners])
        if self.exchange is None:
            return
        chunks = {table: _BLOCK * part.chunk for table, part in parts.items() if part.is_sharded}
        self._places = RowPlaces(
            self.exchange,
            chunks=[chunks.get(owner, 0) for owner in self._owners],
            starts=[_BLOCK * starts.get(owner, 0) for owner in self._owners],
        )
        self._instances = Constant(range(len(self._owners)))

    @override
    def reset_buffers(self) -> None:
        for part, (n, kept) in zip(self.held_parts("words"), self._sizes):
            rows = part.rows
            first, end = (min(_BLOCK * block, n) for block in (rows.start, rows.stop))
            words, counts = pack(torch.arange(first, end) < kept)
            self.words[part.place] = words
            self.counts[part.place] = counts + min(first, kept)

    def fused_routes(self) -> FusedRoutes:
        """The rank of a kept id, or an id's own row where its table is not pruned."""
        self.ensure_filled()
        cpu = torch.device("cpu")
        starts, shared = self._starts.on(cpu).tolist(), self._shared.on(cpu).tolist()
        by_key: dict[str, Sequence[IdRoute]] = {
            key: [
                OwnRow()
                if start < 0
                else RankedRow(words=self.words, counts=self.counts, first_block=start, shared=row)
            ]
            for key, start, row in zip(self._keys, starts, shared)
        }
        limits = self.check.limits
        assert isinstance(limits, list)
        return FusedRoutes(by_key=by_key, limits=limits)

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        features = self.check(features)
        self.ensure_filled()
        ids = features.values().to(torch.int64)
        if self.exchange is not None:
            return renamed(features, self._keys, self._from_all_ranks(features, ids))
        starts, shared = self._starts.on(ids.device), self._shared.on(ids.device)
        if common_count(features) is None:
            starts, shared = per_value(starts, features), per_value(shared, features)
        else:
            ids = ids.view(len(self._keys), -1)
            starts, shared = starts.unsqueeze(1), shared.unsqueeze(1)
        blocks = ids.bitwise_right_shift(8).add_(starts)
        if not self._all_pruned:
            blocks = torch.where(starts >= 0, blocks, 0)
        rows = self._rows(ids, blocks, shared)
        if not self._all_pruned:
            rows = torch.where(starts >= 0, rows, ids)
        return renamed(features, self._keys, rows.reshape(-1))

    def _from_all_ranks(self, features: KeyedJaggedTensor, ids: Tensor) -> Tensor:
        """The rows (N,) of ids where other ranks hold blocks: they say the row of a kept id, or -1."""
        instances = per_value(self._instances.on(ids.device), features)
        pruned = self._starts.on(ids.device)[instances] >= 0
        rows = self._places.ask(instances, torch.where(pruned, ids, 0), self._own_rows)
        found = torch.where(rows < 0, self._shared.on(ids.device)[instances], rows)
        return torch.where(pruned, found, ids)

    def _own_rows(self, places: Tensor) -> Tensor:
        """The rows (n,) of ids whose bits are at these places of this rank's blocks; -1 where pruned."""
        return self._rows(places, places >> 8, places.new_tensor(-1)).to(torch.int32)

    def _rows(self, ids: Tensor, blocks: Tensor, shared: Tensor) -> Tensor:
        """The rank among the kept of ids whose bits stand in these blocks; `shared` where pruned."""
        place = ids & 63
        at = (blocks << 2).add_(ids.bitwise_right_shift(6).bitwise_and_(WORDS - 1))
        word = self.words.view(-1)[at]
        lower = word & torch.bitwise_left_shift(torch.ones_like(place), place).sub_(1)
        rank = count_bits(lower) + self.counts[blocks] + self._before_words()[at]
        return torch.where(word.bitwise_right_shift_(place).bitwise_and_(1) == 1, rank, shared)

    def _before_words(self) -> Tensor:
        """(4 blocks,) uint8 the set bits of each block before each of its words."""
        return self._derived.of([self.words], lambda: bits_before(self.words))


def bits_before(words: Tensor) -> Tensor:
    """(4 blocks,) uint8 the set bits of each block before each of its words (blocks, 4); at most 192."""
    bits = count_bits(words)
    return (bits.cumsum(1) - bits).to(torch.uint8).view(-1)


def count_bits(words: Tensor) -> Tensor:
    """The set bits of each int64, by sums over ever wider fields of bits."""
    # Arithmetic shifts bring in sign bits, which every mask cuts off again.
    pairs = words - ((words >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((eights * 0x0101010101010101) >> 56) & 0x7F
