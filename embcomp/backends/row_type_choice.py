"""Which type each block of rows is served in: the least error, weighted by look-ups, within a number of bytes.

Each block starts in its shortest type. What a longer one would remove of the error for each byte falls from step to step
once types that others beat are left out, so that the steps of all blocks, sorted by that, are taken while they
fit: a larger budget takes all that a smaller one does, and more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from embcomp.tables.row_formats import ROW_TYPES, RowType, row_bytes


@dataclass(frozen=True, kw_only=True)
class TypedBlock:
    """A block of rows that is to have a type.

    Args:
        table: its table.
        index: which block of the table it is.
        rows: how many.
        width: weights of a row.
        errors: by type, the sum over look-ups of what a row is off, squared.
    """

    table: str
    index: int
    rows: int
    width: int
    errors: Mapping[RowType, float]

    def bytes_as(self, row_type: RowType) -> int:
        """What its rows take in a type."""
        return self.rows * row_bytes(self.width, row_type)

    def ladder(self) -> list[RowType]:
        """Types from the shortest on, each removing less for a byte than the one before."""
        found: list[RowType] = []
        order = {each: place for place, each in enumerate(ROW_TYPES)}
        for each in sorted(self.errors, key=lambda t: (self.bytes_as(t), self.errors[t], order[t])):
            if found and self.errors[each] >= self.errors[found[-1]]:
                continue
            while len(found) > 1 and self.gain(found[-2], found[-1]) <= self.gain(found[-2], each):
                found.pop()
            found.append(each)
        return found

    def gain(self, shorter: RowType, longer: RowType) -> float:
        """Error that is removed for each byte."""
        more = self.bytes_as(longer) - self.bytes_as(shorter)
        return (self.errors[shorter] - self.errors[longer]) / more


def choose_types(blocks: Sequence[TypedBlock], budget: int) -> list[RowType] | None:
    """The type of each block.

    Args:
        blocks: all of them.
        budget: bytes for their rows.

    Returns:
        A type for each block; None where the shortest types take more than the budget.
    """
    ladders = [block.ladder() for block in blocks]
    chosen = [ladder[0] for ladder in ladders]
    left = budget - sum(block.bytes_as(each) for block, each in zip(blocks, chosen))
    if left < 0:
        return None
    steps = [
        (-block.gain(ladder[n], ladder[n + 1]), place, n)
        for place, (block, ladder) in enumerate(zip(blocks, ladders))
        for n in range(len(ladder) - 1)
    ]
    for _, place, n in sorted(steps):
        block, ladder = blocks[place], ladders[place]
        left -= block.bytes_as(ladder[n + 1]) - block.bytes_as(ladder[n])
        if left < 0:
            return chosen
        chosen[place] = ladder[n + 1]
    return chosen
