"""State dicts that torch saved, folders of torch.distributed.checkpoint, and single `.npy` tables.

A TorchRec checkpoint is one of the second kind: the shards of a table are joined as they are read,
whatever sharding wrote them. Nothing is unpickled but what `weights_only` allows.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embcomp.compressing.found_tensors import FileRows, FoundTensor, TensorSource
from embcomp.errors import DataError
from embcomp.layers.ranged_files import RangedFiles
from embcomp.training.files.checkpoint_rows import CheckpointTensors

_GLOBAL = re.compile(r"GLOBAL:? ([\w.]+)")  # what torch names of a pickle that it refuses
_NUMPY = {
    np.dtype("<f4"): torch.float32,
    np.dtype("<f2"): torch.float16,
    np.dtype("<f8"): torch.float64,
}


def torch_file(path: Path) -> TensorSource:
    """What `torch.save(model.state_dict())` wrote; of a dict of dicts, names are joined by dots.

    Raises:
        DataError: it cannot be read, or holds more than `weights_only` allows.
    """
    try:
        # On `meta` nothing is read but the index; elements are read later from their offsets.
        loaded = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        named = _GLOBAL.search(str(error))
        what = f" ({named[1]})" if named else ""
        raise DataError(
            f"{path} holds more than plain tensors{what}, which nothing here unpickles; save "
            "model.state_dict(), or a sharded model with torch.distributed.checkpoint"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it ends early"
        raise DataError(f"{path} is no file of torch.save, or truncated: {reason}") from None
    opened = RangedFiles()
    tensors = [_of_torch(path, name, each, opened) for name, each in _flat(loaded, "")]
    return TensorSource(path=path, layout="torch state dict", tensors=tensors, files=[path])


def _of_torch(path: Path, name: str, tensor: Tensor, opened: RangedFiles) -> FoundTensor:
    shape, dtype = tuple(tensor.shape), tensor.dtype

    def rows() -> FileRows:
        begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if begin is None:
            raise DataError(
                f"{path} was written by torch before 1.6; save it again with a newer one"
            )
        if not tensor.is_contiguous():
            raise DataError(f"{path}: {name} is stored as a view; save it with .contiguous()")
        offset = begin + tensor.storage_offset() * tensor.itemsize
        return FileRows(path, offset, shape, dtype, opened)

    return FoundTensor(name=name, shape=shape, dtype=dtype, open=rows)


def _flat(value: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))


def checkpoint_folder(path: Path) -> TensorSource:
    """A folder that torch.distributed.checkpoint wrote.

    Raises:
        CheckpointError: its index cannot be read.
    """
    held = CheckpointTensors(path, None)
    tensors = [
        FoundTensor(name=name, shape=shape, dtype=held.dtype(name), open=partial(held.rows, name))
        for name, shape in held.shapes.items()
    ]
    files = sorted(file for file in path.iterdir() if file.is_file())
    return TensorSource(
        path=path, layout="torch.distributed.checkpoint folder", tensors=tensors, files=files
    )


def npy_file(path: Path) -> TensorSource:
    """One array.

    Raises:
        DataError: it is not of float rows in C order, or truncated.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path} is no .npy file of numbers, or truncated: {reason}") from None
    if array.dtype not in _NUMPY:
        raise DataError(f"{path}: expected fp32, fp16 or fp64 numbers, got {array.dtype}")
    if array.ndim > 1 and not array.flags.c_contiguous:
        raise DataError(f"{path} is in Fortran's order; save numpy.ascontiguousarray of it")
    shape, dtype = tuple(array.shape), _NUMPY[array.dtype]
    rows = partial(FileRows, path, array.offset, shape, dtype, RangedFiles())
    tensor = FoundTensor(name=path.stem, shape=shape, dtype=dtype, open=rows)
    return TensorSource(path=path, layout=".npy file", tensors=[tensor], files=[path])
