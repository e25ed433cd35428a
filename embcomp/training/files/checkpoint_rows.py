"""Tensors of a checkpoint by range, on any number of ranks and whatever sharding wrote them.

torch.distributed.checkpoint keeps a shard as what `torch.save` makes of it, one after another in a file
for each rank. Such a record holds the elements as they lie in memory, so that rows are read from their
offsets. Nothing is unpickled but what `weights_only` allows, and a file's checksum is compared by whoever
reads it first (`check_files`, or a hand-over for itself).
"""

from __future__ import annotations

import io
import pickle
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from typing_extensions import override

from embcomp.errors import CheckpointError
from embcomp.layers.ranged_files import RangedFiles
from embcomp.layers.row_sources import RowSource
from embcomp.training.files.checkpoint_files import CheckpointReader


@dataclass(frozen=True)
class _Chunk:
    """A shard: where it is in the tensor, and where its record is in a file."""

    row: int
    column: int
    shape: tuple[int, ...]
    path: Path
    start: int
    length: int


class CheckpointTensors:
    """The tensors of a checkpoint, by the names that they have in the model.

    Args:
        folder: the checkpoint's.
        part: which of its parts: `model`, or `optim`; None for all of a checkpoint of any program.

    Raises:
        CheckpointError: its index cannot be read.
    """

    def __init__(self, folder: Path, part: str | None = "model") -> None:
        self._folder, self._files = folder, RangedFiles()
        try:
            index = CheckpointReader(folder).read_metadata()
        except (OSError, EOFError, ImportError, AttributeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{folder} is not a readable checkpoint: {error}") from None
        prefix = "" if part is None else f"{part}."
        self._tensors: dict[str, TensorStorageMetadata] = {
            name.removeprefix(prefix): entry
            for name, entry in index.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        self._prefix, self._stored = prefix, index.storage_data

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor's elements.

        Args:
            name: its name in the model.
        """
        return self._entry(name).properties.dtype

    def rows(self, name: str) -> RowSource:
        """A tensor of one axis or two, read by range.

        Args:
            name: its name in the model.

        Raises:
            CheckpointError: it is not there.
        """
        entry = self._entry(name)
        chunks = []
        for chunk in entry.chunks:
            record = self._stored[MetadataIndex(f"{self._prefix}{name}", chunk.offsets)]
            assert not record.transform_descriptors, "checkpoints are written as they are"
            offsets = [*chunk.offsets, 0, 0]
            path = self._folder / record.relative_path
            place = (offsets[0], offsets[1] if len(chunk.offsets) > 1 else 0)
            chunks.append(_Chunk(*place, tuple(chunk.sizes), path, record.offset, record.length))
        return _CheckpointRows(tuple(entry.size), entry.properties.dtype, chunks, self._files)

    def tensor(self, name: str) -> Tensor:
        """A small tensor, whole.

        Args:
            name: its name in the model.

        Raises:
            CheckpointError: it is not there.
        """
        entry = self._entry(name)
        if len(entry.size) in (1, 2):
            return self.rows(name).whole()
        assert len(entry.chunks) == 1, f"{name} was not sharded"
        chunk = entry.chunks[0]
        record = self._stored[MetadataIndex(f"{self._prefix}{name}", chunk.offsets)]
        with (self._folder / record.relative_path).open("rb") as file:
            file.seek(record.offset)
            return torch.load(io.BytesIO(file.read(record.length)), weights_only=True)

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._tensors:
            raise CheckpointError(
                f"{self._folder} is a checkpoint of another model: {name} is not in it"
            )
        return self._tensors[name]


class _CheckpointRows(RowSource):
    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        chunks: list[_Chunk],
        files: RangedFiles,
    ) -> None:
        super().__init__(shape, dtype)
        self._chunks = sorted(chunks, key=lambda chunk: (chunk.row, chunk.column))
        self._rows = [chunk.row for chunk in self._chunks]
        self._tallest = max((chunk.shape[0] for chunk in self._chunks if chunk.shape), default=0)
        self._files = files
        self._offsets: dict[int, int] = {}

    @override
    def read(self, start: int, stop: int) -> Tensor:
        shape = (stop - start, *self.shape[1:])
        found: Tensor | None = None
        first = bisect_left(self._rows, start - self._tallest)
        for number in range(first, bisect_left(self._rows, stop)):
            chunk = self._chunks[number]
            low, high = max(start, chunk.row), min(stop, chunk.row + chunk.shape[0])
            if low >= high:
                continue
            part = self._read_chunk(number, low - chunk.row, high - chunk.row)
            if part.shape == shape:
                return part
            if found is None:
                found = torch.empty(shape, dtype=self.dtype)
            into = found[low - start : high - start]
            if len(shape) > 1:
                into = into[:, chunk.column : chunk.column + chunk.shape[1]]
            into.copy_(part)
        return torch.empty(shape, dtype=self.dtype) if found is None else found

    def _read_chunk(self, number: int, low: int, high: int) -> Tensor:
        chunk = self._chunks[number]
        if number not in self._offsets:
            self._offsets[number] = _offset_of_elements(chunk)
        row_bytes = self.dtype.itemsize * (chunk.shape[1] if len(chunk.shape) > 1 else 1)
        offset = self._offsets[number] + low * row_bytes
        return self._files.read(chunk.path, offset, (high - low, *chunk.shape[1:]), self.dtype)


def _offset_of_elements(chunk: _Chunk) -> int:
    """Where in its file the elements of a shard begin."""
    with chunk.path.open("rb") as file:
        # On `meta` nothing is read but the record's own index.
        record = io.BufferedReader(_View(file, chunk.start, chunk.length))
        found = torch.load(record, map_location="meta", weights_only=True)
    if not found.is_contiguous() or tuple(found.shape) != chunk.shape:
        raise CheckpointError(
            f"{chunk.path} holds a shard of another layout than this embcomp writes; go on with the "
            "embcomp that wrote it"
        )
    offset: int = found.untyped_storage()._checkpoint_offset
    return chunk.start + offset + found.storage_offset() * found.itemsize


class _View(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    @override
    def seekable(self) -> bool:
        return True

    @override
    def readable(self) -> bool:
        return True

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    @override
    def tell(self) -> int:
        return self._at

    @override
    def readinto(self, buffer: object) -> int:
        into = memoryview(buffer)  # type: ignore[arg-type]
        count = max(0, min(len(into), self._length - self._at))
        self._file.seek(self._start + self._at)
        came = self._file.readinto(into[:count])
        self._at += came
        return came
