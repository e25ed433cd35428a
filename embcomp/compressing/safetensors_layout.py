"""Safetensors files, alone or as an indexed folder: only headers are read here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from embcomp.compressing.found_tensors import FileRows, FoundTensor, TensorSource
from embcomp.errors import DataError
from embcomp.layers.ranged_files import RangedFiles

SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def safetensors_file(path: Path) -> TensorSource:
    """One file."""
    tensors = list(_tensors(path, RangedFiles()))
    return TensorSource(path=path, layout="safetensors file", tensors=tensors, files=[path])


def safetensors_folder(path: Path) -> TensorSource | None:
    """A folder of files with an index, or without; None where there are none.

    Args:
        path: the folder, or its index.

    Raises:
        DataError: the index, or a file that it names, is not there or damaged.
    """
    folder, index = (path, path / INDEX) if path.is_dir() else (path.parent, path)
    opened = RangedFiles()
    if not index.is_file():
        files = sorted(folder.glob(f"*{SUFFIX}"))
        if not files:
            return None
        tensors = [tensor for file in files for tensor in _tensors(file, opened)]
        return TensorSource(
            path=path, layout="folder of safetensors files", tensors=tensors, files=files
        )
    places = _weight_map(index)
    names = sorted(set(places.values()))
    files = [folder / name for name in names]
    for name, file in zip(names, files):
        if Path(name).name != name or not file.is_file():
            raise DataError(
                f"{index} names {name}, which is not in {folder}; copy the whole folder"
            )
    held = {(file.name, tensor.name): tensor for file in files for tensor in _tensors(file, opened)}
    missing = [name for name, file in places.items() if (file, name) not in held]
    if missing:
        raise DataError(
            f"{index} says that {missing[0]} is in {places[missing[0]]}, which does not hold it; "
            "copy the whole folder"
        )
    tensors = [held[file, name] for name, file in places.items()]
    return TensorSource(
        path=path, layout="indexed safetensors folder", tensors=tensors, files=[index, *files]
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes())
        places = content["weight_map"]
        if all(isinstance(file, str) for file in places.values()):
            return dict(places)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise DataError(f"{index} is no index of safetensors: expected a weight_map of file names")


def _tensors(path: Path, opened: RangedFiles) -> Iterator[FoundTensor]:
    size, (header, start) = path.stat().st_size, _header(path)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shape = tuple(int(count) for count in entry["shape"])
            low, high = entry["data_offsets"]
            dtype = _DTYPES.get(entry["dtype"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}: its header says nothing usable of {name}") from None
        if start + high > size:
            raise DataError(
                f"{path} is truncated: {name} ends at byte {start + high:,}, the file at {size:,}; "
                "copy it again"
            )
        if dtype is None:  # of no type that tables have
            continue
        if high - low != math.prod(shape) * dtype.itemsize:
            raise DataError(f"{path}: {name} has {high - low:,} bytes, which its shape denies")
        offset = start + low

        def rows(
            offset: int = offset, shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype
        ) -> FileRows:
            return FileRows(path, offset, shape, dtype, opened)

        yield FoundTensor(name=name, shape=shape, dtype=dtype, open=rows)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header, and the byte at which its tensors begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise DataError(f"{path} is no safetensors file, or truncated within its header")
        try:
            content = json.loads(file.read(length))
        except (ValueError, RecursionError):
            content = None
    if not isinstance(content, dict):
        raise DataError(f"{path} is no safetensors file: its header is not JSON")
    return content, 8 + length
