"""Checkpoints: complete, atomic, and readable on any number of ranks.

`checkpoints/step-00000100/` holds TorchRec's sharded state (torch.distributed.checkpoint), each
rank's random state, `state.json`, the loop's own variables, and `checksums.json`. A folder appears
under its final name only when it is complete, and nothing of it is used before it was checked.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from embcomp.errors import CheckpointError, one_line
from embcomp.layers.block_work import Work
from embcomp.layers.learned_buffers import overwriting
from embcomp.tables.budget import format_bytes
from embcomp.training.build import TASK_PREFIX
from embcomp.training.distributed.process import Process
from embcomp.training.files.checkpoint_files import (
    INDEX_FILE,
    CheckpointPlanner,
    CheckpointReader,
    PiecewisePlanner,
    check_file_of,
    check_files,
    checked_bytes,
    random_file,
    read_checksums,
    write_checksums,
    write_own_checksums,
)
from embcomp.training.files.checkpoint_rows import CheckpointTensors
from embcomp.training.files.random_state import random_state, restore_random_state
from embcomp.training.loop_state import LoopState

_STATE_FILE = "state.json"
_FOLDER = re.compile(r"step-(\d{10,})")
_FORMAT_VERSION = 2  # 1 knew tables by their places


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:010d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps that have a complete checkpoint, in order; what else lies beside them is no matter."""
    matches = [
        _FOLDER.fullmatch(folder.name) for folder in checkpoints.glob("step-*") if folder.is_dir()
    ]
    return sorted(int(match[1]) for match in matches if match is not None)


def save_checkpoint(
    checkpoints: Path,
    step: int,
    sharded: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    state: Mapping[str, Any],
    process: Process,
) -> None:
    """Save everything that the rest of a run depends on; all ranks call it.

    Args:
        checkpoints: the run's folder of checkpoints.
        step: steps done.
        sharded: the model.
        optimizer: both optimizers.
        state: the loop's variables, as JSON values; rank 0's are kept.
        process: the process group.
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
            save_tensors(tensors, checkpoint_id=str(temporary), planner=PiecewisePlanner())
            (temporary / random_file(process.rank)).write_bytes(random_state(process))
            write_own_checksums(temporary, process.rank)
            dist.barrier()
            if process.is_main:
                content = {
                    **state,
                    "step": step,
                    "world_size": process.world_size,
                    "format_version": _FORMAT_VERSION,
                }
                (temporary / _STATE_FILE).write_text(json.dumps(content, indent=1) + "\n")
                write_checksums(temporary, [INDEX_FILE, _STATE_FILE])
    except CheckpointError as error:
        free = shutil.disk_usage(checkpoints).free
        if process.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{error}; its disk had {format_bytes(free)} free") from error
    if process.is_main:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    dist.barrier()


def load_checkpoint(
    folder: Path,
    sharded: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    process: Process,
) -> None:
    """Load model and optimizers into a run whose optimizer state exists already.

    Raises:
        CheckpointError: When the checkpoint is another model's; the text names what differs.
    """
    with overwriting(sharded):
        tensors = {"model": model_state(sharded), "optim": optimizer.state_dict()}
        _read_into(tensors, folder, process)
        _load_model_state(sharded, tensors["model"])
    optimizer.load_state_dict(tensors["optim"])
    if read_state(folder)["world_size"] == process.world_size:
        mine = checked_bytes(folder, random_file(process.rank), _way_back(folder))
        try:
            restore_random_state(mine)
        except (KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            first = one_line(error)
            raise CheckpointError(
                f"{folder} could not be read: {random_file(process.rank)} holds no random state "
                f"({first}). {_way_back(folder)}"
            ) from None


def load_weights(folder: Path, sharded: DistributedModelParallel) -> None:
    """Load the model alone.

    Raises:
        CheckpointError: When the checkpoint is another model's; the text names what differs.
    """
    read_state(folder)
    with overwriting(sharded):
        tensors = {"model": model_state(sharded)}
        _read_into(tensors, folder, _process_of_group())
        _load_model_state(sharded, tensors["model"])


def load_whole(folder: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of an unsharded model's state dict; needs no process group.

    Raises:
        CheckpointError: When the checkpoint is damaged or another model's.
    """
    _read_into({"model": state}, folder, None)


def open_whole(folder: Path) -> CheckpointTensors:
    """The tensors of a model, read by range; needs no process group.

    Raises:
        CheckpointError: When the checkpoint is damaged, or of another version.
    """
    read_state(folder)  # refuses other formats
    check_files(folder, _way_back(folder))
    return CheckpointTensors(folder)


def _process_of_group() -> Process:
    return Process(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def _read_into(tensors: dict[str, Any], folder: Path, process: Process | None) -> None:
    """Check a checkpoint's files and read them; all ranks of a process call it, if there is one."""
    if process is None:
        check_files(folder, _way_back(folder))
    else:
        check_files(folder, _way_back(folder), process)
    _check_same_tensors(folder, tensors)
    with _as_checkpoint_error(f"{folder} could not be read", _way_back(folder)):
        load_tensors(
            tensors,
            storage_reader=CheckpointReader(folder),
            planner=CheckpointPlanner(),
            no_dist=process is None,
        )


def checked_by_ranks(folder: Path, work: Work) -> None:
    """Check every file of a checkpoint; ranks share the work, however long it takes.

    Raises:
        CheckpointError: a file is missing or not the one that was written.
    """
    way_out = _way_back(folder)
    names = sorted(read_checksums(folder, way_out))

    def check(name: str) -> dict[str, torch.Tensor]:
        check_file_of(folder, name, way_out)
        return {}

    for _ in work.map(f"checked-{folder.name}", check, names):
        pass


def read_state(folder: Path) -> dict[str, Any]:
    """The loop's variables of a checkpoint.

    Raises:
        CheckpointError: They are damaged, or those of another step or version.
    """
    way_out = _way_back(folder)
    try:
        content = json.loads(checked_bytes(folder, _STATE_FILE, way_out))
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: {one_line(error)}. {way_out}"
        ) from None
    version = content.pop("format_version", 1)
    if version != _FORMAT_VERSION:
        knew = ", which knew a table by its place and not by its name" if version == 1 else ""
        raise CheckpointError(
            f"{folder} was written by another embcomp{knew}: its checkpoints have format {version}, "
            f"this one reads {_FORMAT_VERSION}. Go on with the embcomp that wrote it, or train again "
            "under another name"
        )
    known = {each.name for each in dataclasses.fields(LoopState)} | {"world_size"}
    if set(content) != known:
        odd = ", ".join(sorted(set(content) ^ known))
        raise CheckpointError(
            f"{folder} is a checkpoint of another version of embcomp: {_STATE_FILE} differs in "
            f"{odd}. Finish the run with the embcomp that wrote it"
        )
    if checkpoint_folder(folder.parent, content["step"]).name != folder.name:
        raise CheckpointError(
            f"{folder} holds the checkpoint of step {content['step']}: it was renamed or copied. "
            "Give it its name again, or remove it"
        )
    return content


def remove_old(checkpoints: Path, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the latest `keep` and the best."""
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
        for failure, _ in error.failures.values():
            if not isinstance(failure, Exception):  # Ctrl-C or SIGTERM on a rank, no fault
                raise failure from error
        reasons = [f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items()]
        text = f"{what}: {'; '.join(reasons)}"
        raise CheckpointError(f"{text.rstrip('.')}. {way_out}" if way_out else text) from error
    except OSError as error:
        text = f"{what}: {error.strerror or error}"
        raise CheckpointError(f"{text}. {way_out}" if way_out else text) from error


def _way_back(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    step = int(folder.name.removeprefix("step-"))
    earlier = [saved for saved in saved_steps(folder.parent) if saved < step]
    place = f"step {earlier[-1]}" if earlier else "its start"
    return f"If it is damaged, remove it: an unfinished run then goes on from {place}"


def _read_metadata(folder: Path) -> Metadata:
    try:
        return CheckpointReader(folder).read_metadata()
    except (OSError, EOFError, ImportError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder} is not a readable checkpoint: {one_line(error)}. {_way_back(folder)}"
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
