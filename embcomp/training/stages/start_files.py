"""What a stage begins with, as files that every rank reads its part of.

`start/model.safetensors` holds what is small. Tensors as long as a table are in pieces, a folder for each,
and `start/model.safetensors.index.json` says which rows of which pieces a tensor of the model is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from embcomp.errors import CheckpointError
from embcomp.io.atomic_files import atomic_path
from embcomp.layers.block_work import Work, row_blocks
from embcomp.layers.held_pieces import local_pieces
from embcomp.layers.learned_buffers import overwriting
from embcomp.layers.row_sources import RowSource, as_rows
from embcomp.training.checkpoint import model_state
from embcomp.training.files.row_pieces import PieceRows, RowPiece, checksum_of
from embcomp.training.files.run_checksums import (
    announce_file,
    check_file,
    read_checked,
    write_checked,
)

INDEX_FILE = "model.safetensors.index.json"
SMALL_FILE = "model.safetensors"


def stored_in_pieces(tensors: Mapping[str, Tensor | RowSource], work: Work) -> dict[str, Any]:
    """The same with every long tensor in pieces of the work's folder; all ranks call it."""
    return {name: _in_pieces(name, each, work) for name, each in tensors.items()}


def _in_pieces(name: str, tensor: Tensor | RowSource, work: Work) -> Tensor | PieceRows:
    if isinstance(tensor, Tensor | PieceRows):
        return tensor
    source, columns = tensor, torch.Size(tensor.shape[1:]).numel()
    found = work.write(
        f"start-{name}",
        lambda block: source.read(block.start, block.stop),
        row_blocks(name, len(source), columns),
        source.shape,
        source.dtype,
    )
    assert isinstance(found, PieceRows)
    return found


def write_index(folder: Path, tensors: Mapping[str, Tensor | PieceRows]) -> None:
    """Write down what is where, and what is small; one rank calls it.

    Args:
        folder: `start`, in which the pieces lie.
        tensors: by their names in the model.
    """
    small = {name: each.contiguous() for name, each in tensors.items() if isinstance(each, Tensor)}
    with atomic_path(folder / SMALL_FILE) as temporary:
        safetensors.torch.save_file(small, temporary)
        announce_file(folder / SMALL_FILE, temporary)
    entries = {
        name: _entry(folder, each) for name, each in tensors.items() if isinstance(each, PieceRows)
    }
    weight_map = dict.fromkeys(small, SMALL_FILE)
    content = {"metadata": {"rows": entries}, "weight_map": weight_map}
    write_checked(folder / INDEX_FILE, json.dumps(content) + "\n")


def _entry(folder: Path, rows: PieceRows) -> dict[str, Any]:
    return {
        "shape": list(rows.shape),
        "dtype": str(rows.dtype).removeprefix("torch."),
        "first": rows.first,
        "pieces": [
            [str(piece.path.relative_to(folder)), piece.rows, checksum_of(piece.path)]
            for piece in rows.pieces
        ],
    }


def remove_the_rest(folder: Path) -> None:
    """Remove what the way to the start left beside it: what no tensor of the model is made of."""
    used = {
        Path(path).parts[0]
        for entry in _read_index(folder)["metadata"]["rows"].values()
        for path, _, _ in entry["pieces"]
    }
    for path in folder.iterdir():
        if path.is_dir():
            if path.name not in used:
                shutil.rmtree(path)
            else:
                for mark in path.glob("done-*"):
                    mark.unlink()
        elif path.name.startswith("failed-"):
            path.unlink()


def load_start(folder: Path, sharded: DistributedModelParallel, *, checks: bool) -> None:
    """Fill a sharded model with what its stage begins with; what is not there stays as drawn.

    Args:
        folder: `start`.
        sharded: the model.
        checks: whether this rank checks what all read, for all, which stop when one does.
    """
    if checks:
        check_file(folder / SMALL_FILE)
    small = safetensors.torch.load_file(folder / SMALL_FILE)
    sources = _long_tensors(folder)
    came = set(small) | set(sources)
    with torch.no_grad(), overwriting(sharded, came):
        state = model_state(sharded)
        odd = sorted(came - set(state))
        if odd:
            raise CheckpointError(
                f"{folder} holds {odd[0]}, which the stage has not: another embcomp wrote it. "
                "Go on with that one, or train again under another name"
            )
        fill_state(state, {**small, **sources})


def fill_state(state: Mapping[str, Any], tensors: Mapping[str, Tensor | RowSource]) -> None:
    """Fill a model's tensors, of sharded ones the parts on this rank; every rank does its own.

    Args:
        state: the model's state dict.
        tensors: what goes there, whole; narrower where columns of the model's only pad.
    """
    for name, whole in tensors.items():
        if isinstance(whole, Tensor) and not whole.dim():
            for piece, _ in local_pieces(state[name]):
                piece.copy_(whole)
            continue
        source = as_rows(whole)
        for piece, (row, *columns) in local_pieces(state[name]):
            _fill(piece, source, row, columns[0] if columns else 0)


def load_optimizer_start(folder: Path, optimizer: CombinedOptimizer, *, checks: bool) -> None:
    """Fill optimizers with what they begin with; what is not there, or of another shape, stays as of no step.

    Args:
        folder: as `load_start` has one for the model.
        optimizer: of a model that is sharded, its state complete.
        checks: whether this rank checks what all read.
    """
    if checks:
        check_file(folder / SMALL_FILE)
    sources: dict[str, Any] = {**safetensors.torch.load_file(folder / SMALL_FILE)}
    sources |= _long_tensors(folder)
    state = optimizer.state_dict()
    for name, wanted in _dotted(state).items():
        came = sources.get(name)
        if came is None or tuple(came.shape) != _shape_of(wanted):
            continue
        with torch.no_grad():
            if isinstance(came, Tensor) and came.dim() not in (1, 2):
                wanted.copy_(came)
                continue
            for piece, (row, *columns) in local_pieces(wanted):
                _fill(piece, as_rows(came), row, columns[0] if columns else 0)
    optimizer.load_state_dict(state)


def _shape_of(value: Tensor | ShardedTensor) -> tuple[int, ...]:
    return tuple(value.metadata().size if isinstance(value, ShardedTensor) else value.shape)


def _dotted(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor | ShardedTensor]:
    """The tensors of nested mappings by the names that checkpoints have for them."""
    found: dict[str, Tensor | ShardedTensor] = {}
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            found |= _dotted(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor | ShardedTensor):
            found[f"{prefix}{key}"] = value
    return found


def _fill(piece: Tensor, source: RowSource, row: int, column: int) -> None:
    """Copy a piece's part of a tensor, a block at a time; columns that only pad become zeros."""
    piece.zero_()
    for block in row_blocks("", len(piece), torch.Size(source.shape[1:]).numel()):
        part = source.read(row + block.start, row + block.stop)
        if piece.dim() != 2:
            piece[block.rows] = part
            continue
        columns = min(piece.shape[1], part.shape[1] - column)
        if columns > 0:
            piece[block.rows, :columns] = part[:, column : column + columns]


def long_tensors(folder: Path) -> dict[str, RowSource]:
    """The tensors of a start that are in pieces, by their names in the model."""
    return dict(_long_tensors(folder))


def _long_tensors(folder: Path) -> dict[str, RowSource]:
    return {
        name: PieceRows(
            [
                RowPiece(path=folder / path, rows=rows, checksum=checksum)
                for path, rows, checksum in entry["pieces"]
            ],
            entry["shape"],
            getattr(torch, entry["dtype"]),
            first=entry["first"],
            way_out=f"Remove {folder.parent}, and the run begins that stage again",
        )
        for name, entry in _read_index(folder)["metadata"]["rows"].items()
    }


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(read_checked(folder / INDEX_FILE))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder / INDEX_FILE} is missing; remove {folder.parent}, and the run makes it again"
        ) from None
    return content
