"""Rows that are looked up in any order: a copy of them in a temporary file, where they are many."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

from embcomp.io.mapped_arrays import temporary_bytes
from embcomp.layers.block_work import row_blocks
from embcomp.layers.row_sources import MemoryRows, RowSource


class MappedCopy:
    """A tensor of rows that are read by range, made when it is first asked for.

    It pages in what is looked at, so that it takes room on a disk and none that a process holds. Rows that
    are in memory anyway are not copied.

    Args:
        rows: of which any may be asked for.
        what: what they are, for messages.
    """

    def __init__(self, rows: RowSource, what: str) -> None:
        self._rows, self._what = rows, what
        self._copy = rows.tensor if isinstance(rows, MemoryRows) else None
        self._copying = Lock()

    def tensor(self) -> Tensor:
        """All rows; nobody writes into them.

        Raises:
            DataError: there is no room for the file.
        """
        with self._copying:
            if self._copy is None:
                self._copy = self._copied()
        return self._copy

    def _copied(self) -> Tensor:
        rows, size = self._rows, self._rows.row_bytes
        filled = torch.from_numpy(temporary_bytes(len(rows) * size, self._what))
        copy = filled.view(rows.dtype).view(rows.shape)
        for block in row_blocks("", len(rows), -(-size // 4)):
            copy[block.rows] = rows.read(block.start, block.stop)
        return copy
