"""Initial rows that are the same however a table is sharded.

TorchRec calls a table's `init_fn` on every shard with the process's random state: equal seeds make the
shards of a row-wise table copies of each other, other numbers of ranks make another table. Here a
table is drawn in blocks of rows, each from a seed of its own, and a shard takes what belongs to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

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
    for piece, (first_row, first_column) in local_pieces(weight):
        end_row, end_column = first_row + piece.shape[0], first_column + piece.shape[1]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for start in range(first_row // _BLOCK_ROWS * _BLOCK_ROWS, end_row, _BLOCK_ROWS):
                # Drawn whole: a shorter tensor would not be the beginning of a longer one.
                rows = torch.empty(min(_BLOCK_ROWS, table_rows - start), width)
                torch.manual_seed(_block_seed(seed, name, start // _BLOCK_ROWS))
                init_fn(rows)
                rows[:, used_columns:] = 0
                low, high = max(start, first_row), min(start + len(rows), end_row)
                mine = rows[low - start : high - start, first_column:end_column]
                piece[low - first_row : high - first_row].copy_(mine)


def local_pieces(weight: Tensor | ShardedTensor) -> list[tuple[Tensor, list[int]]]:
    """The parts of a table on this rank, with the row and column where each begins."""
    if isinstance(weight, ShardedTensor):
        return [(s.tensor, s.metadata.shard_offsets) for s in weight.local_shards()]
    return [(weight, [0, 0])]


def _block_seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def fill_function(name: str, scale: float) -> InitFn:
    """The distribution that a config names, for every table."""

    def fill(rows: Tensor) -> Tensor:
        if name == "normal":
            return nn.init.normal_(rows, std=scale)
        return nn.init.uniform_(rows, -scale, scale)

    return fill
