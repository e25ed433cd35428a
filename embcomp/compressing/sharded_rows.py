"""The rows of sharded tables as files that all ranks read by range: none holds what another does.

Each rank writes its own shards, a block at a time. Where a shard's files are follows from where it is in
its table, which every rank knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from embcomp.errors import ConfigError, EmbcompError
from embcomp.layers.block_work import RowBlock, row_blocks
from embcomp.layers.held_pieces import local_pieces
from embcomp.layers.row_sources import ComputedRows, MemoryRows, RowSource
from embcomp.training.files.row_pieces import PieceRows, RowPiece, write_piece

Weight = Tensor | ShardedTensor


def rows_of_shards(weights: Mapping[str, Weight], folder: Path) -> dict[str, RowSource]:
    """Rows of tables, whatever shards them, as float32; every rank calls it.

    Args:
        weights: by table, (num_embeddings, embedding_dim); what is not sharded is the same on all ranks.
        folder: where the files are made; all ranks see it.

    Raises:
        ConfigError: a table is sharded as DTensor.
        EmbcompError: a rank cannot write; all of them raise it.
    """
    for name, weight in weights.items():
        if isinstance(weight, DTensor):
            raise ConfigError(
                f"table {name!r} is a DTensor: shard the model without output_dtensor, or save it with "
                "torch.distributed.checkpoint and give `embcomp compress` the folder"
            )
    problem = None
    try:
        for number, weight in enumerate(weights.values()):
            if isinstance(weight, ShardedTensor):
                _write(weight, folder / f"{number}")
    except OSError as error:
        problem = f"rank {dist.get_rank()}: {folder} could not be written: {error.strerror}"
    raise_together(problem)
    return {
        name: _read(weight, folder / f"{n}") for n, (name, weight) in enumerate(weights.items())
    }


def raise_together(problem: str | None) -> None:
    """Raise an EmbcompError on all ranks where any has a problem."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    found = [each for each in problems if each is not None]
    if found:
        raise EmbcompError(found[0])


def _write(weight: ShardedTensor, folder: Path) -> None:
    for piece, place in local_pieces(weight):
        own = _place(folder, place)
        own.mkdir(parents=True, exist_ok=True)
        for number, block in enumerate(_blocks(piece.shape)):
            write_piece(_file(own, number), {"rows": piece.detach()[block.rows]}, repr(block))


def _read(weight: Weight, folder: Path) -> RowSource:
    if not isinstance(weight, ShardedTensor):
        return MemoryRows(weight.detach().cpu().float())
    about = weight.metadata()
    dtype = about.tensor_properties.dtype
    parts = [
        _part(_place(folder, each.shard_offsets), each, dtype) for each in about.shards_metadata
    ]
    stored = _JoinedShards(about.size, dtype, parts)
    if dtype == torch.float32:
        return stored
    return ComputedRows(
        stored.shape, torch.float32, lambda a, b: stored.read(a, b).float(), of=[stored]
    )


@dataclass(frozen=True)
class _Part:
    """A shard: where it begins in its table, and its rows."""

    row: int
    column: int
    rows: RowSource


def _part(folder: Path, about: ShardMetadata, dtype: torch.dtype) -> _Part:
    row, column = about.shard_offsets
    shape = about.shard_sizes
    pieces = [
        RowPiece(path=_file(folder, number), rows=len(block))
        for number, block in enumerate(_blocks(shape))
    ]
    return _Part(row, column, PieceRows(pieces, shape, dtype, way_out="Begin again"))


class _JoinedShards(RowSource):
    """Shards of any split, by rows, columns or both."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, parts: Sequence[_Part]) -> None:
        super().__init__(shape, dtype)
        self._parts = [part for part in parts if len(part.rows)]

    @override
    def read(self, start: int, stop: int) -> Tensor:
        found = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        for part in self._parts:
            low, high = max(start, part.row), min(stop, part.row + len(part.rows))
            if low < high:
                columns = slice(part.column, part.column + part.rows.shape[1])
                own = part.rows.read(low - part.row, high - part.row)
                found[low - start : high - start, columns] = own
        return found


def _blocks(shape: Sequence[int]) -> list[RowBlock]:
    return row_blocks("", *shape) if len(shape) == 2 else []


def _place(folder: Path, offsets: Sequence[int]) -> Path:
    return folder / "-".join(map(str, offsets))


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:08}.safetensors"
