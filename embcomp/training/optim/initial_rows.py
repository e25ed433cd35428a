"""Initial rows that are the same however a table is sharded.

TorchRec calls a table's `init_fn` on every shard with the process's random state: equal seeds make the
shards of a row-wise table copies of each other, other numbers of ranks make another table. Here a
table is drawn in blocks of rows, each from a seed of its own, and a shard takes what belongs to it.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from typing_extensions import override

from embcomp.layers.held_pieces import local_pieces
from embcomp.layers.row_sources import RowSource

_BLOCK_ROWS = 65536

InitFn = Callable[[Tensor], object]


def initialize_rows(
    weight: Tensor | ShardedTensor, init_fn: InitFn, *, seed: int, name: str, used_columns: int
) -> None:
    """Fill the local part of a table.

    Args:
        weight: (rows, columns) the table, whole or sharded by rows or columns.
        init_fn: fills a block of rows, each element independent of the block's shape.
        seed: the run's seed.
        name: the table's full name; tables of one run differ in it.
        used_columns: the columns behind it only pad rows to a kernel's width and become zero.
    """
    if isinstance(weight, ShardedTensor):
        table_rows, width = weight.metadata().size  # its size() warns that the class is old
    else:
        table_rows, width = weight.shape
    whole = InitialRows(table_rows, width, init_fn, seed=seed, name=name, used_columns=used_columns)
    for piece, (first_row, first_column) in local_pieces(weight):
        end_row, end_column = first_row + piece.shape[0], first_column + piece.shape[1]
        for start in range(first_row // _BLOCK_ROWS * _BLOCK_ROWS, end_row, _BLOCK_ROWS):
            low, high = max(start, first_row), min(start + _BLOCK_ROWS, end_row)
            mine = whole.read(low, high)[:, first_column:end_column]
            with torch.no_grad():
                piece[low - first_row : high - first_row].copy_(mine)


class InitialRows(RowSource):
    """The rows that a table begins with, drawn whenever they are read.

    Args:
        table_rows: rows of the table.
        width: its columns, those that only pad included.
        init_fn: fills a block of rows, each element independent of the block's shape.
        seed: the run's seed.
        name: the table's full name; tables of one run differ in it.
        used_columns: the columns behind it become zero.
    """

    _drawing = threading.Lock()  # torch has one random state for all threads
    _latest: ClassVar[weakref.ref[InitialRows] | None] = None  # the one that keeps a block

    def __init__(
        self,
        table_rows: int,
        width: int,
        init_fn: InitFn,
        *,
        seed: int,
        name: str,
        used_columns: int,
    ) -> None:
        super().__init__((table_rows, width), torch.float32)
        self._init_fn, self._seed, self._name = init_fn, seed, name
        self._used_columns = used_columns
        self._drawn: tuple[int, Tensor] | None = None

    @override
    def read(self, start: int, stop: int) -> Tensor:
        parts = []
        with self._drawing:
            for block in range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS)):
                first = block * _BLOCK_ROWS
                parts.append(self._block(block)[max(start - first, 0) : stop - first])
        if not parts:
            return torch.empty((0, self.shape[1]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _block(self, block: int) -> Tensor:
        """A block of the table; the last one that was asked for of all tables is kept."""
        if self._drawn is None or self._drawn[0] != block:
            # Drawn whole: a shorter tensor would not be the beginning of a longer one.
            length = min(_BLOCK_ROWS, len(self) - block * _BLOCK_ROWS)
            rows = torch.empty(length, self.shape[1])
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(_block_seed(self._seed, self._name, block))
                self._init_fn(rows)
            rows[:, self._used_columns :] = 0
            latest = None if InitialRows._latest is None else InitialRows._latest()
            if latest is not None:
                latest._drawn = None  # of many tables, each would keep a block
            InitialRows._latest, self._drawn = weakref.ref(self), (block, rows)
        return self._drawn[1]


def _block_seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def fill_function(name: str, scale: float) -> Callable[[Tensor], Tensor]:
    """The distribution that a config names, for every table."""

    def fill(rows: Tensor) -> Tensor:
        if name == "normal":
            return nn.init.normal_(rows, std=scale)
        return nn.init.uniform_(rows, -scale, scale)

    return fill
