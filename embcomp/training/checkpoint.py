"""Checkpoints: complete, atomic, and readable on any number of ranks.

`checkpoints/step-00000100/` holds TorchRec's sharded state (torch.distributed.checkpoint), each
rank's random state, and `state.json`, the loop's own variables. A folder appears under its final name
only when it is complete.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from embcomp.errors import CheckpointError
from embcomp.tables.budget import format_bytes
from embcomp.training.build import TASK_PREFIX
from embcomp.training.distributed.process import Process

_STATE_FILE = "state.json"


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:010d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps that have a complete checkpoint, in order."""
    return sorted(int(folder.name.removeprefix("step-")) for folder in checkpoints.glob("step-*"))


def save_checkpoint(
    checkpoints: Path,
    step: int,
    sharded: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    state: Mapping[str, Any],
    process: Process,
) -> None:
    """Saves everything that the rest of a run depends on; all ranks call it.

    Args:
        checkpoints: The run's folder of checkpoints.
        step: Steps done.
        sharded: The model.
        optimizer: Both optimizers.
        state: The loop's variables, as JSON values; rank 0's are kept.
        process: The process group.
    """
    final = checkpoint_folder(checkpoints, step)
    temporary = checkpoints / f".{final.name}.tmp"
    if process.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    tensors = {"model": model_state(sharded), "optim": optimizer.state_dict()}
    try:
        with _as_checkpoint_error(f"{final} could not be written"):
            save_tensors(tensors, checkpoint_id=str(temporary))
    except CheckpointError as error:
        free = shutil.disk_usage(checkpoints).free
        if process.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{error}; its disk had {format_bytes(free)} free") from error
    packed = io.BytesIO()  # torch reports a disk that is full as an internal assertion
    torch.save(_random_state(process), packed)
    (temporary / f"random-{process.rank}.pt").write_bytes(packed.getvalue())
    dist.barrier()
    if process.is_main:
        content = {**state, "step": step, "world_size": process.world_size}
        (temporary / _STATE_FILE).write_text(json.dumps(content, indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    dist.barrier()


def load_checkpoint(
    folder: Path,
    sharded: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    process: Process,
) -> None:
    """Loads model and optimizers into a run whose optimizer state exists already.

    Raises:
        CheckpointError: When the checkpoint is another model's; the text names what differs.
    """
    tensors = {"model": model_state(sharded), "optim": optimizer.state_dict()}
    _check_same_tensors(folder, tensors)
    with _as_checkpoint_error(f"{folder} could not be read", _way_back(folder)):
        load_tensors(tensors, checkpoint_id=str(folder))
    _load_model_state(sharded, tensors["model"])
    optimizer.load_state_dict(tensors["optim"])
    mine = folder / f"random-{process.rank}.pt"
    if read_state(folder)["world_size"] == process.world_size:
        _restore_random_state(torch.load(mine, weights_only=False))


def load_weights(folder: Path, sharded: DistributedModelParallel) -> None:
    """Loads the model alone.

    Raises:
        CheckpointError: When the checkpoint is another model's; the text names what differs.
    """
    tensors = {"model": model_state(sharded)}
    _check_same_tensors(folder, tensors)
    with _as_checkpoint_error(f"{folder} could not be read", _way_back(folder)):
        load_tensors(tensors, checkpoint_id=str(folder))
    _load_model_state(sharded, tensors["model"])


def read_state(folder: Path) -> dict[str, Any]:
    """The loop's variables of a checkpoint."""
    try:
        return json.loads((folder / _STATE_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: {error}. {_way_back(folder)}"
        ) from None


def remove_old(checkpoints: Path, keep: int, best: int | None) -> None:
    """Removes all checkpoints but the latest `keep` and the best."""
    for step in saved_steps(checkpoints)[:-keep]:
        if step != best:
            shutil.rmtree(checkpoint_folder(checkpoints, step))


def model_state(sharded: DistributedModelParallel) -> dict[str, Any]:
    """The model's tensors under the names they have in the unsharded model."""
    return {key.removeprefix(TASK_PREFIX): value for key, value in sharded.state_dict().items()}


def _load_model_state(sharded: DistributedModelParallel, state: Mapping[str, Any]) -> None:
    sharded.load_state_dict({TASK_PREFIX + key: value for key, value in state.items()})


def _check_same_tensors(folder: Path, wanted: Mapping[str, Any]) -> None:
    saved = {
        key: _saved_shape(entry)
        for key, entry in _read_metadata(folder).state_dict_metadata.items()
        if key.partition(".")[0] in wanted
    }
    mine = {
        f"{part}.{key}": shape
        for part, tensors in wanted.items()
        for key, shape in _shapes(tensors).items()
    }
    differences = [
        f"{key} is {_shown(saved[key])} there and {_shown(mine[key])} here"
        for key in sorted(set(mine) & set(saved))
        if saved[key] != mine[key]
    ]
    differences += [f"{key} is not in it" for key in sorted(set(mine) - set(saved))]
    differences += [f"{key} is not in this model" for key in sorted(set(saved) - set(mine))]
    # What differs in the model differs in the optimizer's state too.
    differences = [d for d in differences if d.startswith("model.")] or differences
    if differences:
        more = f" (and {len(differences) - 5} more)" if len(differences) > 5 else ""
        raise CheckpointError(
            f"{folder} is a checkpoint of another model: {'; '.join(differences[:5])}{more}. "
            "Use the config that it was made with, or another run name"
        )


@contextmanager
def _as_checkpoint_error(what: str, way_out: str = "") -> Iterator[None]:
    """Torch's own exception shows a traceback of every rank, and `except Exception` misses it."""
    try:
        yield
    except CheckpointException as error:
        reasons = [f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items()]
        text = f"{what}: {'; '.join(reasons)}"
        raise CheckpointError(f"{text.rstrip('.')}. {way_out}" if way_out else text) from error


def _way_back(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    step = int(folder.name.removeprefix("step-"))
    earlier = [saved for saved in saved_steps(folder.parent) if saved < step]
    place = f"step {earlier[-1]}" if earlier else "its start"
    return f"If it is damaged, remove it: an unfinished run then goes on from {place}"


def _read_metadata(folder: Path) -> Metadata:
    try:
        return FileSystemReader(str(folder)).read_metadata()
    except (OSError, EOFError, ImportError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder} is not a readable checkpoint: {error}. {_way_back(folder)}"
        ) from None


def _shapes(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[int, ...] | None]:
    """Shapes by the dotted names that torch.distributed.checkpoint gives to nested entries."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            shapes |= _shapes(value, f"{prefix}{key}.")
        else:
            shapes[f"{prefix}{key}"] = _shape(value)
    return shapes


def _shape(value: object) -> tuple[int, ...] | None:
    if isinstance(value, ShardedTensor):
        return tuple(value.metadata().size)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _saved_shape(entry: object) -> tuple[int, ...] | None:
    return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None


def _shown(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else " x ".join(map(str, shape)) or "a number"


def _random_state(process: Process) -> dict[str, Any]:
    state = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    if process.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(process.device)
    return state


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
