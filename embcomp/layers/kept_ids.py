"""Some ids of a table: a bit for each, and counts of them, asked either way.

What a route knows of a pruned table (`embcomp.layers.pruned_route`), for those who number ids anew. It takes
1.25 bits an id, where a list of ids would take 64 for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embcomp.layers.pruned_route import WORDS, bits_before, count_bits, num_blocks, pack, unpack
from embcomp.layers.row_sources import RowSource

_AT_ONCE = 1 << 16  # ids that are packed or found together
_WORD, _BLOCK = 64, 64 * WORDS


class KeptIds:
    """Which ids of a table are kept, and which of them comes where.

    Args:
        words: (blocks, 4) int64, the lowest bit for the lowest id.
        counts: (blocks,) int32 kept ids before each block of 256.
        num_ids: of the table.
    """

    def __init__(self, words: Tensor, counts: Tensor, num_ids: int) -> None:
        self.num_ids = num_ids
        self._words, self._counts = words, counts
        parts = [bits_before(part) for part in words.split(_AT_ONCE // _BLOCK)]
        self._in_block = torch.cat(parts)
        last = self.mask(_BLOCK * (len(counts) - 1), num_ids) if num_ids else words[:0]
        self._kept = int(counts[-1]) + int(last.sum()) if num_ids else 0

    @classmethod
    def of(cls, mask: RowSource) -> KeptIds:
        """Those of a mask.

        Args:
            mask: (N,) bool.
        """
        blocks = num_blocks(len(mask))
        words = torch.zeros(blocks, WORDS, dtype=torch.int64)
        counts = torch.zeros(blocks, dtype=torch.int32)
        before = 0
        for start in range(0, len(mask), _AT_ONCE):
            own = mask.read(start, min(start + _AT_ONCE, len(mask)))
            place = slice(start // _BLOCK, start // _BLOCK + num_blocks(len(own)))
            words[place], counts[place] = pack(own)
            counts[place] += before
            before += int(own.sum())
        return cls(words, counts, len(mask))

    def __len__(self) -> int:
        return self._kept

    def before(self, id_: int) -> int:
        """How many kept ids are below an id that is a multiple of 256, or the number of all."""
        return self._kept if id_ >= self.num_ids else int(self._counts[id_ // _BLOCK])

    def mask(self, start: int, stop: int) -> Tensor:
        """(stop - start,) bool which ids of a range are kept."""
        first, end = start // _BLOCK, num_blocks(stop)
        bits = unpack(self._words[first:end], min(_BLOCK * end, self.num_ids) - _BLOCK * first)
        return bits[start - _BLOCK * first : stop - _BLOCK * first]

    def places(self, ids: Tensor) -> Tensor:
        """Where ids come among those that are kept: (n,) int64, -1 for others.

        Args:
            ids: (n,) int64.
        """
        found = torch.empty_like(ids)
        for part, into in zip(ids.split(_AT_ONCE), found.split(_AT_ONCE)):
            into.copy_(self._places(part))
        return found

    def _places(self, ids: Tensor) -> Tensor:
        words, place = self._words.view(-1)[ids >> 6], ids & (_WORD - 1)
        lower = words & (torch.bitwise_left_shift(torch.ones_like(place), place) - 1)
        found = count_bits(lower) + self._counts[ids >> 8] + self._in_block[ids >> 6]
        return torch.where((words >> place) & 1 == 1, found, -1)

    def ids(self, start: int, stop: int) -> Tensor:
        """(stop - start,) int64 the kept ids from one place to another, rising."""
        if start >= stop:
            return torch.empty(0, dtype=torch.int64)
        ends = torch.tensor([start, stop - 1])
        first, last = (torch.searchsorted(self._counts, ends, right=True) - 1).tolist()
        found, low = [], first * _BLOCK
        end = min((last + 1) * _BLOCK, self.num_ids)
        for begin in range(low, end, _AT_ONCE):
            own = self.mask(begin, min(begin + _AT_ONCE, end))
            found.append(own.nonzero()[:, 0] + begin)
        skipped = start - int(self._counts[first])
        return torch.cat(found)[skipped : skipped + stop - start]
