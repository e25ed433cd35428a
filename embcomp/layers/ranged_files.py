"""Ranges of files as tensors: read where they lie, without mapping or loading the rest."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class RangedFiles:
    """Files that stay open while ranges of them are read."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        weakref.finalize(self, _close, self._open)

    def read(self, path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose bytes lie in a file, row after row.

        Args:
            path: the file.
            offset: of its first byte.
            shape: of the tensor.
            dtype: of its elements.

        Raises:
            OSError: the file is not there, or ends before.
        """
        found = torch.empty(tuple(shape), dtype=dtype)
        if not found.numel():
            return found
        into = found.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(into):
            came = os.preadv(self._handle(path), [into[done:]], offset + done)
            if not came:
                raise OSError(f"{path} ends before byte {offset + len(into)}")
            done += came
        return found

    def _handle(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]


def _close(handles: dict[Path, int]) -> None:
    for handle in handles.values():
        os.close(handle)
