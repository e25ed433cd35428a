"""Safetensors files written block by block: one file, or several with the format's own index.

A file has the bytes that `safetensors.torch.save_file` would give it. Where the tensors take more than a
file may, each file takes as many of them, in their order, as fit; a tensor is never split.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from embcomp.io.piece_checksums import RunningChecksum
from embcomp.io.tensor_checksums import bytes_of
from embcomp.io.tensor_files import DTYPES, index_text

_ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}


@dataclass(frozen=True, kw_only=True)
class NewTensor:
    """A tensor that is to be written.

    Args:
        name: its name in the file.
        shape: its shape.
        dtype: its type.
        blocks: makes it, in consecutive parts along its first axis, on the CPU.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path, name: str, tensors: Iterable[NewTensor], *, file_bytes: int
) -> dict[str, str]:
    """Write tensors to a folder.

    Args:
        folder: where to.
        name: of the file if there is one, `model.safetensors`; several are
            `model-00001-of-00003.safetensors` and so on, beside `model.safetensors.index.json`.
        tensors: what to write; of each no more than a block is in memory.
        file_bytes: what the tensors of a file may take, but for one that is larger by itself.

    Returns:
        The checksum of each tensor, by its name.
    """
    ordered = sorted(tensors, key=lambda each: (-_ORDER[each.dtype], each.name))
    parts = _split(ordered, file_bytes)
    stem, suffix = Path(name).stem, Path(name).suffix
    names = (
        [name]
        if len(parts) == 1
        else [f"{stem}-{n:05d}-of-{len(parts):05d}{suffix}" for n in range(1, len(parts) + 1)]
    )
    checksums: dict[str, str] = {}
    for own, part in zip(names, parts):
        checksums |= _write_file(folder / own, part)
    if len(parts) > 1:
        files = {own: [each.name for each in part] for own, part in zip(names, parts)}
        total = sum(each.nbytes for each in ordered)
        (folder / f"{name}.index.json").write_text(index_text(files, total), encoding="utf-8")
    return {each.name: checksums[each.name] for each in ordered}


def _split(tensors: Sequence[NewTensor], file_bytes: int) -> list[list[NewTensor]]:
    parts: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.nbytes > file_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    return parts


def _write_file(path: Path, tensors: Sequence[NewTensor]) -> dict[str, str]:
    with path.open("wb") as file:
        file.write(_header(tensors))
        checksums: dict[str, str] = {}
        for tensor in tensors:
            running, size = RunningChecksum(), 0
            for block in tensor.blocks():
                assert block.dtype == tensor.dtype, (tensor.name, block.dtype)
                data = bytes_of(block)
                running.update(data)
                file.write(data.data)
                size += len(data)
            assert size == tensor.nbytes, f"{tensor.name}: {size} bytes came of {tensor.nbytes}"
            checksums[tensor.name] = running.text()
    return checksums


def _header(tensors: Sequence[NewTensor]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.nbytes
        content[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
