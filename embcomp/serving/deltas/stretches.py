"""An artefact's files as stretches of rows: headers, tensors, and whole files of other kinds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import Self

from embcomp.io.tensor_files import StoredTensor, header_size
from embcomp.serving.artefact_config import TENSORS_SUFFIX
from embcomp.serving.deltas.row_differences import OldRows, Rows, rows_per_block

_FLAT_ROW = 16  # bytes that stand for a row of what has none: packed codes, vectors
_FILE_ROW = 64  # and of other files, in whose archives tensors begin at multiples of it


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Consecutive bytes of a file.

    Attributes:
        file: the file.
        start: the first of them.
        nbytes: how many.
        row_bytes: of a row.
        tensor: the tensor's name, where they are one.
    """

    file: Path
    start: int
    nbytes: int
    row_bytes: int
    tensor: str | None = None

    @property
    def count(self) -> int:
        """How many rows there are; the last one may be shorter."""
        return -(-self.nbytes // self.row_bytes)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The first row of each block, and how many it has."""
        step = rows_per_block(self.row_bytes)
        for first in range(0, self.count, step):
            yield first, min(step, self.count - first)


class OpenFiles:
    """Files that are read by place; a context manager that closes them."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def rows(self, of: Stretch, start: int, stop: int) -> Rows:
        """Rows of a stretch; what the last one lacks is zeros.

        Raises:
            OSError: the file is shorter than it was.
        """
        if of.file not in self._handles:
            self._handles[of.file] = os.open(of.file, os.O_RDONLY)
        found = np.zeros((stop - start, of.row_bytes), dtype=np.uint8)
        flat = found.reshape(-1)
        wanted = min(stop * of.row_bytes, of.nbytes) - start * of.row_bytes
        done = 0
        while done < wanted:
            at = of.start + start * of.row_bytes + done
            came = os.preadv(self._handles[of.file], [flat[done:wanted].data], at)
            if not came:
                raise OSError(f"{of.file} ends too early")
            done += came
        return found

    def old_rows(self, of: Stretch | None, row_bytes: int) -> OldRows:
        """The rows of a stretch that was there before; none where there was none."""
        if of is None:
            return OldRows(read=lambda *_: np.zeros((0, row_bytes), dtype=np.uint8), count=0)
        stretch = of
        return OldRows(
            read=lambda start, stop: self.rows(stretch, start, stop), count=stretch.count
        )


def stretches_of(file: Path, tensors: Mapping[str, StoredTensor]) -> list[Stretch]:
    """A file cut where tensors begin.

    Args:
        file: the file.
        tensors: all tensors of the artefact by name.
    """
    size = file.stat().st_size
    if file.suffix != TENSORS_SUFFIX:
        return [Stretch(file=file, start=0, nbytes=size, row_bytes=_FILE_ROW)]
    found, at = [], header_size(file)
    found.append(Stretch(file=file, start=0, nbytes=at, row_bytes=_FILE_ROW))
    own = [tensor for tensor in tensors.values() if tensor.file == file and tensor.nbytes]
    for tensor in sorted(own, key=lambda tensor: tensor.start):
        assert tensor.start == at, "the format leaves no gaps"
        found.append(
            Stretch(
                file=file,
                start=at,
                nbytes=tensor.nbytes,
                row_bytes=_row_bytes(tensor),
                tensor=tensor.name,
            )
        )
        at += tensor.nbytes
    assert at == size, "the format leaves no gaps"
    return found


def _row_bytes(tensor: StoredTensor) -> int:
    return tensor.nbytes // tensor.shape[0] if len(tensor.shape) > 1 else _FLAT_ROW
