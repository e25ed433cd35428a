"""Ids that have all their physical rows in common, counted while a part of them is held.

The rows of an id are mixed into 128 bits, by which ids are told apart: that two ids of a billion with other
rows come out alike has a chance below 1e-20. The bits lie in a temporary file, and ids are sorted a part at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp.io.mapped_arrays import temporary_zeros

_FACTORS = (-7046029254386353131, -4417276706812531889)  # odd, of xxHash's and murmur's constants
_SHIFT = 29
_PART_IDS = 1 << 19  # that are sorted together, which takes about 100 bytes for each
_AT_ONCE = 1 << 20  # ids whose bits are looked at together
_PREFIX_BITS = 31


class IdKeys:
    """What tells ids of a table apart by their rows.

    Args:
        num_embeddings: ids of the table.
    """

    def __init__(self, num_embeddings: int) -> None:
        bits = temporary_zeros(2 * num_embeddings, "128 bits for every id of a table")
        self._bits = torch.from_numpy(bits).view(2, num_embeddings)

    def put(self, start: int, rows: Sequence[Tensor]) -> None:
        """Take note of the rows of a block of ids.

        Args:
            start: the first id.
            rows: for each look-up, (ids,) int64 rows; negative where it is skipped.
        """
        for own, factor in zip(self._bits, _FACTORS):
            mixed = own[start : start + len(rows[0])]
            mixed.fill_(factor)
            for each in rows:
                mixed.add_(each).mul_(factor)
                mixed.bitwise_xor_(mixed.bitwise_right_shift(_SHIFT))

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids, ascending, and their bits (2, ids), a part at a time; ids of equal bits are in one part."""
        ids = self._bits.shape[1]
        count = -(-ids // _PART_IDS)
        for part in range(count):
            found, bits = [], []
            for start in range(0, ids, _AT_ONCE):
                own = self._bits[:, start : start + _AT_ONCE]
                prefix = own[0].bitwise_right_shift(64 - _PREFIX_BITS) & ((1 << _PREFIX_BITS) - 1)
                inside = (prefix % count == part).nonzero()[:, 0]
                found.append(inside + start)
                bits.append(own[:, inside])
            yield torch.cat(found), torch.cat(bits, dim=1)


@dataclass(frozen=True, kw_only=True)
class Collisions:
    """How many ids share all their rows with another.

    Attributes:
        ids: those that do.
        traffic: what those count that meet another, more frequent one; of equals, the lower id leads.
    """

    ids: int = 0
    traffic: float = 0.0

    @classmethod
    def of(cls, keys: IdKeys, left_out: Tensor, traffic: Tensor | None) -> Collisions:
        """Count them.

        Args:
            keys: of all ids.
            left_out: (ids,) bool, which ids are not counted, though others may share rows with them.
            traffic: (ids,) how often each occurs; None where nobody counted.
        """
        together, meeting = 0, 0.0
        for ids, bits in keys.parts():
            own = torch.zeros_like(ids) if traffic is None else traffic[ids].to(torch.int64)
            order = own.argsort(descending=True, stable=True)
            for each in bits.flip(0):
                order = order[each[order].argsort(stable=True)]
            ordered = bits[:, order]
            begins = torch.ones(len(order), dtype=torch.bool)
            begins[1:] = (ordered[:, 1:] != ordered[:, :-1]).any(dim=0)
            group = begins.cumsum(0) - 1
            counted = ~left_out[ids[order]]
            together += int(((group.bincount()[group] > 1) & counted).sum())
            meeting += float(own[order][~begins & counted].sum())
        return cls(ids=together, traffic=meeting)
