"""Which rows of a group's tables pass, in a bit for each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from embcomp.layers.row_sources import RowSource

_AT_ONCE = 1 << 20  # rows whose bits are packed together; a multiple of 8


class FixedRows:
    """The rows that pass.

    Args:
        masks: for each table, (N,) bool, read by range.
    """

    def __init__(self, masks: Sequence[RowSource]) -> None:
        sizes = [-(-len(mask) // 8) for mask in masks]
        self._bits = torch.empty(sum(sizes), dtype=torch.uint8)
        self._starts = torch.tensor([0, *accumulate(sizes)][:-1])
        for mask, start in zip(masks, self._starts.tolist()):
            for row in range(0, len(mask), _AT_ONCE):
                own = mask.read(row, min(row + _AT_ONCE, len(mask))).cpu().numpy()
                packed = torch.from_numpy(np.packbits(own, bitorder="little"))
                self._bits[start + row // 8 :][: len(packed)] = packed

    def pass_(self, ids: Tensor, tables: Tensor) -> Tensor:
        """Which ids pass: a bool of their shape.

        Args:
            ids: of any shape.
            tables: the table of each, broadcast to them.
        """
        self._bits, self._starts = self._bits.to(ids.device), self._starts.to(ids.device)
        own = self._bits[self._starts[tables] + (ids >> 3)]
        return ((own >> (ids & 7).to(torch.uint8)) & 1).bool()
