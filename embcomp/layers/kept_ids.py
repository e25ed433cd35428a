"""Some ids of a table: a bit for each and a count per 256 of them, asked either way.

What a route knows of a pruned table (`embcomp.layers.pruned_route`), for those who number ids anew. It takes
1.125 bits an id, where a list of ids would take 64 for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embcomp.layers.pruned_route import WORDS, count_bits, num_blocks, pack, unpack
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
        words = self._words[ids >> 8]  # (n, 4)
        bits = (ids & (_BLOCK - 1)).unsqueeze(1) - _WORD * torch.arange(WORDS)  # in each word
        ones = torch.bitwise_left_shift(torch.ones_like(bits), bits.clamp(0, _WORD - 1)) - 1
        lower = torch.where(bits < 0, 0, torch.where(bits < _WORD, ones, -1))
        here = (bits >= 0) & (bits < _WORD)
        is_kept = ((words >> bits.clamp(0, _WORD - 1)) & here).any(1)
        place = self._counts[ids >> 8] + count_bits(words & lower).sum(1)
        return torch.where(is_kept, place, -1)

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
