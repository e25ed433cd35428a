"""Work on blocks in one process whose results are files, so that a killed command goes on from them.

A block's file holds what came out of it and a checksum; a file that is there and whole is not made
again. Names of steps may come twice: then they are told apart by their order, which is the same in
every run of the same command.
"""

from __future__ import annotations

import errno
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from embcomp.errors import DataError
from embcomp.io.atomic_files import atomic_path
from embcomp.io.tensor_checksums import bytes_of
from embcomp.layers.block_work import Item, Statistics, part_sizes
from embcomp.layers.row_sources import JoinedRows, RowSource
from embcomp.tables.name_hash import name64

Step = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows a step of so many blocks; what it yields is called with the number of blocks just done."""


def in_silence(name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A step that nobody is shown."""
    return nullcontext(lambda done: None)


class KeptWork:
    """Work in a folder.

    Args:
        folder: where results are kept; it is there, and only this process writes in it.
        step: is told what goes on.
    """

    def __init__(self, folder: Path, step: Step = in_silence) -> None:
        self._folder, self._step = folder, step
        self._names: Counter[str] = Counter()

    def map(
        self, name: str, function: Callable[[Item], Statistics], items: Sequence[Item]
    ) -> Iterator[Statistics]:
        """Small results of a function, in the order of the items."""
        folder = self._do(name, function, items)
        for number, item in enumerate(items):
            yield _kept(_file(folder, number), repr(item))

    def write(
        self,
        name: str,
        function: Callable[[Any], Tensor],
        items: Sequence[Any],
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        sizes: Sequence[int] | None = None,
    ) -> RowSource:
        """A tensor whose consecutive parts a function makes."""
        own = part_sizes(name, items, shape, sizes)

        def part(item: Any) -> Statistics:
            return {"rows": function(item).to(dtype)}

        folder = self._do(name, part, items)
        parts: list[RowSource] = [
            _KeptRows(_file(folder, n), repr(item), (rows, *shape[1:]), dtype)
            for n, (item, rows) in enumerate(zip(items, own))
        ]
        return JoinedRows(parts) if parts else _KeptRows(folder, "", shape, dtype)

    def _do(self, name: str, function: Callable[[Any], Statistics], items: Sequence[Any]) -> Path:
        self._names[name] += 1
        folder = self._folder / f"{_plain(name)}-{self._names[name]}"
        folder.mkdir(exist_ok=True)
        with self._step(name, len(items)) as advance:
            for number, item in enumerate(items):
                path = _file(folder, number)
                if _whole(path, repr(item)) is None:
                    _keep(path, function(item), repr(item))
                advance(1)
        return folder


class _KeptRows(RowSource):
    """A block of rows in its file."""

    def __init__(self, path: Path, item: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._path, self._item = path, item

    @override
    def read(self, start: int, stop: int) -> Tensor:
        if start >= stop:
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        with safe_open(self._path, framework="pt") as file:
            found: Tensor = file.get_slice("rows")[start:stop]
        return found.clone()


def _keep(path: Path, tensors: Mapping[str, Tensor], item: str) -> None:
    """Write a block's results."""
    own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    said = {"item": item, **_checksums(own)}
    with atomic_path(path, durable=False) as temporary:
        try:
            safetensors.torch.save_file(own, temporary, metadata=said)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(errno.EIO, str(error), str(path)) from None


def _whole(path: Path, item: str) -> dict[str, Tensor] | None:
    """A block's results; None where they are not there, damaged, or another block's."""
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        return None
    return found if said == {"item": item, **_checksums(found)} else None


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of each tensor; blocks are too small to be worth threads."""
    return {f"crc32.{name}": f"{zlib.crc32(bytes_of(t).data):08x}" for name, t in tensors.items()}


def _kept(path: Path, item: str) -> dict[str, Tensor]:
    found = _whole(path, item)
    if found is None:
        raise DataError(f"{path} was changed while it was worked with; run the same command again")
    return found


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:08}.safetensors"


def _plain(name: str) -> str:
    """A step's folder: its name, in which tables' names may hold anything."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:80]
    return plain if plain == name else f"{plain}-{name64(name):016x}"
