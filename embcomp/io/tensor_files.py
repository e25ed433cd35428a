"""Where the tensors of safetensors files lie, one file or several with an index, without reading them.

Several files have the format's own index beside them, `model.safetensors.index.json`, as Hugging Face's
libraries write and read it: the total size, and the file of every tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from embcomp.io.inner_paths import inner_path

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""The format's names of types, in the order in which it lays tensors out, last first."""
_TYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file.

    Args:
        name: its name there.
        file: the file.
        start: its first byte.
        shape: its shape.
        dtype: its type.
    """

    name: str
    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensors_of_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name.

    Raises:
        ValueError, SafetensorError: the file is no safetensors file, or damaged.
    """
    # The library checks that every byte belongs to one tensor. It maps the file to read only for numpy, but for
    # torch so that it counts as data of the process in full.
    with safetensors.safe_open(file, "numpy"):
        pass
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(_TYPES))
    if unknown:
        raise ValueError(f"a tensor has the type {unknown[0]}")
    return {
        name: StoredTensor(
            name=name,
            file=file,
            start=8 + length + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
            dtype=_TYPES[entry["dtype"]],
        )
        for name, entry in header.items()
    }


def header_size(file: Path) -> int:
    """Bytes of a safetensors file before its first tensor, as the file says; at most its size."""
    with file.open("rb") as stream:
        return min(8 + int.from_bytes(stream.read(8), "little"), file.stat().st_size)


def index_text(files: Mapping[str, Iterable[str]], total: int) -> str:
    """The index of several files.

    Args:
        files: the names of the tensors in each file.
        total: bytes of all tensors.
    """
    places = {name: file for file, names in files.items() for name in names}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(content, indent=2) + "\n"


def files_of_index(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says; files are beside it.

    Raises:
        ValueError: it is no index, or names a file elsewhere.
    """
    content = json.loads(index.read_bytes().decode("utf-8"))
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError("it has no weight_map from tensors to files")
    for file in set(places.values()):
        inner_path(file)
    return places
