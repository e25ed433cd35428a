"""The tensors of an artefact, read when they are asked for and checked while they are read.

Bytes go from the file into the memory that will be served from, a piece at a time, and each piece is
checked while it is still in the processor's cache. So loading holds what it serves and nothing beside.
A mapped tensor stays in its file: checking it reads the file through a small buffer.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from embcomp.errors import ArtefactError
from embcomp.io.large_pages import LargePages
from embcomp.io.piece_checksums import Bytes, PieceChecksum, checksum_of_text
from embcomp.io.tensor_checksums import bytes_of
from embcomp.io.tensor_files import StoredTensor
from embcomp.serving.artefact_config import CONFIG_FILE

WAY_OUT = "copy the whole folder again, or export the run again"

_TASK = 8 << 20  # bytes that a thread reads at once: a whole number of pieces
_THREADS = max(1, min(8, len(os.sched_getaffinity(0))))


class TensorReader:
    """Open files, and threads that read them; a context manager that closes both.

    What was mapped stays mapped for as long as a tensor of it lives.

    Args:
        mapped: whether tensors stay in their files.
        large: whether those that do not are kept on large pages.
    """

    def __init__(self, *, mapped: bool = False, large: bool = False) -> None:
        self.mapped, self.large = mapped, large
        self._memory = LargePages()
        self._open = ExitStack()
        self._handles: dict[Path, int] = {}
        self._maps: dict[Path, Tensor] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="read")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._open.close()

    def read(self, tensor: StoredTensor, out: Bytes, checksum: str | None) -> None:
        """Read a tensor's bytes.

        Args:
            tensor: where it is.
            out: as many bytes, contiguous.
            checksum: of its bytes; None checks nothing.

        Raises:
            ArtefactError: the bytes have another checksum, or end too early.
        """

        def part(start: int, stop: int, kind: PieceChecksum | None) -> list[int]:
            step = _TASK if kind is None else kind.piece
            numbers: list[int] = []
            for at in range(start, stop, step):
                piece = out[at : min(at + step, stop)]
                self._fill(tensor, at, piece)
                if kind is not None:
                    numbers.append(kind.of_piece(piece))
            return numbers

        self._in_parts(tensor, checksum, part)

    def check(self, tensor: StoredTensor, checksum: str | None) -> None:
        """Read a tensor through a small buffer, and compare its checksum where there is one."""

        def part(start: int, stop: int, kind: PieceChecksum | None) -> list[int]:
            assert kind is not None
            buffer = np.empty(min(kind.piece, stop - start), dtype=np.uint8)
            numbers = []
            for at in range(start, stop, kind.piece):
                piece = buffer[: min(kind.piece, stop - at)]
                self._fill(tensor, at, piece)
                numbers.append(kind.of_piece(piece))
            return numbers

        if checksum is not None:
            self._in_parts(tensor, checksum, part)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a tensor that is looked up: on large pages, where there are that many bytes."""
        if not self.large or 0 in shape:
            return torch.empty(shape, dtype=dtype)
        return self._memory.empty(shape, dtype)

    def file_map(self, file: Path) -> Tensor:
        """All bytes of a file, (size,) uint8; reading them touches their pages, writing is forbidden."""
        if file not in self._maps:
            content = mmap.mmap(self._handle(file), 0, access=mmap.ACCESS_READ)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                self._maps[file] = torch.frombuffer(content, dtype=torch.uint8)
        return self._maps[file]

    def _in_parts(self, tensor: StoredTensor, checksum: str | None, part: Any) -> None:
        kind = None if checksum is None else checksum_of_text(checksum)
        spans = [
            (at, min(at + _TASK, tensor.nbytes), kind) for at in range(0, tensor.nbytes, _TASK)
        ]
        if len(spans) > 1:
            self._handle(tensor.file)  # opened here, not by several threads
            numbers = list(self._pool.map(lambda span: part(*span), spans))
        else:
            numbers = [part(*span) for span in spans]
        if kind is not None and kind.text([n for own in numbers for n in own]) != checksum:
            odd = ", and it holds NaN or infinities" if self._is_odd(tensor) else ""
            raise ArtefactError(
                f"{tensor.file} is damaged or was changed: the checksum of the tensor "
                f"{tensor.name} is not the one in {CONFIG_FILE}{odd}; {WAY_OUT}"
            )

    def _fill(self, tensor: StoredTensor, at: int, piece: Bytes) -> None:
        handle, done = self._handle(tensor.file), 0
        while done < len(piece):
            count = os.preadv(handle, [piece[done:].data], tensor.start + at + done)
            if not count:
                raise ArtefactError(f"{tensor.file} is damaged: it ends too early; {WAY_OUT}")
            done += count

    def _is_odd(self, tensor: StoredTensor) -> bool:
        """Whether some number of a tensor is none."""
        if not tensor.dtype.is_floating_point:
            return False
        for at in range(0, tensor.nbytes, _TASK):
            piece = np.empty(min(_TASK, tensor.nbytes - at), dtype=np.uint8)
            self._fill(tensor, at, piece)
            if not bool(torch.from_numpy(piece).view(tensor.dtype).isfinite().all()):
                return True
        return False

    def _handle(self, file: Path) -> int:
        if file not in self._handles:
            self._handles[file] = handle = os.open(file, os.O_RDONLY)
            self._open.callback(os.close, handle)
        return self._handles[file]


@dataclass(frozen=True, kw_only=True)
class ArtefactTensor:
    """A tensor that is read when it is asked for.

    Args:
        stored: where it is.
        checksum: of its bytes; None checks nothing.
        reader: reads it, for as long as it is open.
    """

    stored: StoredTensor
    checksum: str | None
    reader: TensorReader

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return self.stored.dtype

    @property
    def mapped(self) -> bool:
        """Whether it stays in its file."""
        return self.reader.mapped

    def read_into(self, out: Tensor) -> None:
        """Fill a contiguous tensor of as many bytes on the CPU."""
        assert out.is_contiguous() and out.nbytes == self.stored.nbytes
        self.reader.read(self.stored, bytes_of(out), self.checksum)

    def tensor(self) -> Tensor:
        """The tensor: in its file where it is mapped, in memory of its own elsewhere."""
        if not self.mapped or not self.stored.nbytes:
            made = self.reader.empty(self.shape, self.dtype)
            self.read_into(made)
            return made
        self.reader.check(self.stored, self.checksum)
        content = self.reader.file_map(self.stored.file)
        own = content[self.stored.start : self.stored.start + self.stored.nbytes]
        if self.stored.start % self.dtype.itemsize:  # no writer of ours lays tensors out like that
            own = own.clone()
        return own.view(self.dtype).view(self.shape)

    def file_bytes(self) -> tuple[Tensor, int]:
        """All bytes of the mapped file, and where this tensor begins in them; it is checked."""
        self.reader.check(self.stored, self.checksum)
        return self.reader.file_map(self.stored.file), self.stored.start


def lazily(
    stored: Mapping[str, StoredTensor], checksums: Mapping[str, str], reader: TensorReader
) -> dict[str, ArtefactTensor]:
    """The tensors of an artefact by name.

    Args:
        stored: where they are.
        checksums: by name; those that have none are not checked.
        reader: reads them.
    """
    return {
        name: ArtefactTensor(stored=each, checksum=checksums.get(name), reader=reader)
        for name, each in stored.items()
    }
