"""Checksums against damage: CRC-32s, which zlib computes about as fast as memory is read.

They find what disks, networks and editors do to bytes. They are no signature: whoever can write a
file can write its checksum too.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from embcomp.io.piece_checksums import SUMS64

_PIECE = 8 << 20  # bytes that a thread checks at once; zlib lets the others run meanwhile
_THREADS = max(1, min(8, len(os.sched_getaffinity(0)) - 1))  # one core is left to the caller


class Checksums:
    """A few threads that compute checksums; a context manager that ends them.

    A checksum is the CRC-32 of the CRC-32s of pieces of 8 MiB, in hexadecimal digits. So one large
    table keeps all threads busy.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="checksum")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def of_file(self, path: Path, *, start: int = 0, stop: int | None = None) -> Callable[[], str]:
        """Begin with a file's bytes, or those from `start` to `stop`."""
        end = path.stat().st_size if stop is None else stop
        pieces = [(at, min(end, at + _PIECE)) for at in range(start, end, _PIECE)]
        return self._joined([self._pool.submit(_crc_of_file, path, *piece) for piece in pieces])

    @staticmethod
    def _joined(parts: Sequence[Future[int]]) -> Callable[[], str]:
        def wait() -> str:
            numbers = [part.result() for part in parts]
            return f"{zlib.crc32(struct.pack(f'<{len(numbers)}I', *numbers)):08x}"

        return wait


def _crc_of_file(path: Path, start: int, stop: int) -> int:
    with path.open("rb") as file:
        file.seek(start)
        return zlib.crc32(file.read(stop - start))


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """A tensor's bytes in row order; a view where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def file_checksums(paths: Iterable[Path]) -> dict[Path, str]:
    """The checksums of whole files."""
    with Checksums() as checksums:
        begun = {path: checksums.of_file(path) for path in paths}
        return {path: wait() for path, wait in begun.items()}


def checksum_of(tensor: Tensor) -> str:
    """The checksum of a tensor's bytes, as artefacts hold it."""
    data = bytes_of(tensor)
    return SUMS64.text(SUMS64.numbers(data))
