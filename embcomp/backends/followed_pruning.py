"""Which ids of a pruned table keep a row, and which row each begins with, once ids are another dataset's.

As many as before, the same where they are there. Rows that retired values leave go to new values, then to
ids that nobody has yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from embcomp.backends.base import FollowInputs
from embcomp.backends.pruned_directory import KeptBits, mask_blocks
from embcomp.layers.block_work import RowBlock, Work, add_up
from embcomp.layers.followed_ids import FollowedIds, RowMove
from embcomp.layers.kept_ids import KeptIds
from embcomp.layers.row_sources import ComputedRows, JoinedRows, MemoryRows, RowSource
from embcomp.tables.specs import TableSpec


@dataclass(frozen=True, kw_only=True)
class FollowedRows:
    """The rows of a table today.

    Attributes:
        move: where they come from.
        kept: (num_embeddings,) bool which ids have one of their own.
        counts: how many these are in each of the table's blocks.
    """

    move: RowMove
    kept: RowSource
    counts: Sequence[int]


def followed_rows(
    table: TableSpec, past: FollowInputs, bits: KeptBits | None, kept: int | None
) -> FollowedRows:
    """Find the rows of a table; which ids had one is held for one table at a time, 1.25 bits an id.

    Args:
        table: the table today.
        past: what is known.
        bits: which ids had a row of their own; None for all.
        kept: how many ids keep one; None for all.
    """
    then = next(each for each in past.tables_before if each.name == table.name)
    earlier = None
    if bits is not None:
        earlier = KeptIds(bits.words.whole(), bits.counts.whole(), then.num_embeddings)
    return _Following(table, then, past.ids[table.name], earlier, kept, past.work).found()


class _Following:
    """Follows the rows of one table.

    Args:
        table: the table today.
        then: as it was.
        ids: where its ids come from.
        earlier: the ids that had rows of their own; None for all.
        kept: how many ids keep one; None for all.
        work: does what is to be done for all ids.
    """

    def __init__(
        self,
        table: TableSpec,
        then: TableSpec,
        ids: FollowedIds,
        earlier: KeptIds | None,
        kept: int | None,
        work: Work,
    ) -> None:
        self._table, self._then, self._ids, self._earlier = table, then, ids, earlier
        self._kept, self._work, self._blocks = kept, work, mask_blocks(table)
        # Behind all others stands the row that pruned ids share, which a whole table has not.
        self._shared = -1 if earlier is None else len(earlier)

    def found(self) -> FollowedRows:
        """The rows, which are written down."""
        weights = self._weights()
        if self._kept is None:
            shape = (len(self._ids.before),)
            rows = ComputedRows(shape, torch.int64, self._rows, of=[self._ids.before])
            kept = ComputedRows(shape, torch.bool, lambda a, b: torch.ones(b - a, dtype=torch.bool))
            move = RowMove(rows=rows, fresh=self._ids.fresh, weights=weights)
            return FollowedRows(move=move, kept=kept, counts=[len(own) for own in self._blocks])
        kept_ids, counts = self._kept_ids()
        move = RowMove(
            rows=self._of_kept("rows", self._rows, kept_ids, counts, self._shared),
            fresh=self._of_kept("fresh", self._ids.fresh.read, kept_ids, counts, self._shared < 0),
            weights=weights,
        )
        return FollowedRows(move=move, kept=kept_ids, counts=counts)

    def _rows(self, start: int, stop: int) -> Tensor:
        """(stop - start,) int64 the earlier row of each id of a range; -1 for the mean of all."""
        before = self._ids.before.read(start, stop)
        if self._earlier is None:
            return before
        places = self._earlier.places(before.clamp(min=0))
        return torch.where(before < 0, -1, torch.where(places < 0, self._shared, places))

    def _of_kept(
        self,
        name: str,
        read: Callable[[int, int], Tensor],
        kept: RowSource,
        counts: Sequence[int],
        shared: float,
    ) -> RowSource:
        """What is known of ids, for those that keep a row and, behind them, for those that share one."""
        last = torch.tensor([shared], dtype=read(0, 0).dtype)

        def part(block: RowBlock) -> Tensor:
            return read(block.start, block.stop)[kept.read(block.start, block.stop)]

        step = f"{name}-{self._table.name}"
        shape = (sum(counts),)
        written = self._work.write(step, part, self._blocks, shape, last.dtype, sizes=counts)
        return JoinedRows([written, MemoryRows(last)])

    def _kept_ids(self) -> tuple[RowSource, list[int]]:
        """(num_embeddings,) bool which ids keep a row, and how many of each block do."""

        def count(block: RowBlock) -> Mapping[str, Tensor]:
            return {"counts": self._classes(block).sum(1)}

        name = self._table.name
        found = self._work.map(f"wanting-{name}", count, self._blocks)
        quotas = _quotas(torch.stack([each["counts"] for each in found]), self._kept or 0)
        by_block = dict(zip(self._blocks, quotas))

        def kept(block: RowBlock) -> Tensor:
            classes = self._classes(block)
            first = classes.cumsum(1) <= by_block[block].unsqueeze(1)
            return (classes & first).any(0)

        shape = (self._table.num_embeddings,)
        written = self._work.write(f"kept-{name}", kept, self._blocks, shape, torch.bool)
        return written, quotas.sum(1).tolist()

    def _classes(self, block: RowBlock) -> Tensor:
        """(4, n) bool: those that had a row, new values, ids that nobody has yet, and all others."""
        place = (block.start, block.stop)
        fresh, has_value = self._ids.fresh.read(*place), self._ids.has_value.read(*place)
        had_row = ~fresh
        if self._earlier is not None:
            before = self._ids.before.read(*place)
            had_row &= self._earlier.places(before.clamp(min=0)) >= 0
        return torch.stack([had_row, fresh & has_value, fresh & ~has_value, ~fresh & ~had_row])

    def _weights(self) -> RowSource:
        """(earlier rows,) float64 how often each row's ids occurred."""
        earlier, counts = self._earlier, self._ids.counts
        if earlier is None:
            return counts
        blocks = mask_blocks(self._then)

        def own(block: RowBlock) -> Tensor:
            kept = earlier.mask(block.start, block.stop)
            return counts.read(block.start, block.stop)[kept]

        def others(block: RowBlock) -> Mapping[str, Tensor]:
            kept = earlier.mask(block.start, block.stop)
            return {"sum": counts.read(block.start, block.stop)[~kept].sum()}

        name = self._table.name
        sizes = [b - a for a, b in pairwise(earlier.before(each.start) for each in blocks)]
        sizes.append(len(earlier) - sum(sizes))
        shape, dtype = (len(earlier),), torch.float64
        written = self._work.write(f"weights-{name}", own, blocks, shape, dtype, sizes=sizes)
        pruned = add_up(self._work, f"pruned-{name}", others, blocks)["sum"]
        return JoinedRows([written, MemoryRows(pruned.view(1))])


def _quotas(counts: Tensor, kept: int) -> Tensor:
    """(blocks, 4) how many of each class keep a row, the first classes and blocks before others.

    Args:
        counts: (blocks, 4) how many there are.
        kept: how many do in all.
    """
    ordered = counts.t().reshape(-1)
    before = ordered.cumsum(0) - ordered
    taken = torch.minimum((kept - before).clamp(min=0), ordered)
    return taken.view(counts.shape[1], -1).t().contiguous()
