"""Work on blocks whose results are files: shared by ranks, and gone on with after a kill.

Every rank does its own share of the blocks, a contiguous one, and writes what comes out of each as a file
(`embcomp.training.files.row_pieces`). A file that is there is not made again; steps of one name are told
apart by their order, which is the same whenever the same work is gone on with. A rank that is done waits for
the others by looking at files, not in a collective operation, which would give up after some minutes.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self, override

from embcomp.errors import CheckpointError
from embcomp.io.atomic_files import write_atomically
from embcomp.layers.block_work import BLOCK_BYTES, Item, Statistics, part_sizes
from embcomp.layers.row_sources import RowSource
from embcomp.training.distributed.process import Process
from embcomp.training.distributed.rank_watchdog import RankFailedError
from embcomp.training.files.row_pieces import PieceRows, RowPiece, read_piece, write_piece

BLOCK_COST = 16 * BLOCK_BYTES
"""What work on a block takes at the most: its rows, and what is made of them in float64."""


class Progress(Protocol):
    """Is told what goes on."""

    def begin(self, name: str, total: int) -> None:
        """A step of so many blocks of this rank begins."""

    def advance(self) -> None:
        """A block is done; any thread says so."""

    def wait(self, ranks: Sequence[int]) -> None:
        """This rank is done, and these are not."""

    def end(self) -> None:
        """The step is done on all ranks."""


_LOOKS = (0.005, 0.5)  # seconds between two looks at what others have done, growing


class FolderWork(AbstractContextManager["FolderWork"]):
    """Work in a folder that all ranks see; a context manager that tells the others of a failure.

    Args:
        folder: where the files are; it is made.
        process: the process group, all ranks of which make the same calls.
        memory: bytes that blocks may take at once, beside what a rank holds anyway.
        progress: is told what goes on.
    """

    def __init__(self, folder: Path, process: Process, memory: int, progress: Progress) -> None:
        self._folder, self._process, self._progress = folder, process, progress
        self._lanes = _lanes(memory)
        self._names: Counter[str] = Counter()
        attempt = [uuid.uuid4().hex]
        if process.world_size > 1:
            dist.broadcast_object_list(attempt, src=0)
        self._attempt: str = attempt[0]
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    @override
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._process.world_size > 1:
            text = f"{self._attempt}{type(error).__name__}: {error}".split("\n")[0]
            write_atomically(self._folder / f"failed-{self._process.rank}", text, durable=False)

    def map(
        self, name: str, function: Callable[[Item], Statistics], items: Sequence[Item]
    ) -> Iterator[Statistics]:
        """Small results of a function, in the order of the items."""
        folder = self._do(name, function, items)
        for number, item in enumerate(items):
            found = read_piece(_piece(folder, number), _described(item))
            if found is None:
                raise CheckpointError(
                    f"{_piece(folder, number)} is damaged; run the same command again, and it is made "
                    "anew"
                )
            yield found

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
        expected = dict(zip(map(_described, items), own))

        def part(item: Any) -> Statistics:
            made = function(item).to(dtype)
            wanted = (expected[_described(item)], *shape[1:])
            assert tuple(made.shape) == wanted, f"{name}: {made.shape} came, {wanted} was announced"
            return {"rows": made}

        folder = self._do(name, part, items)
        pieces = [RowPiece(path=_piece(folder, n), rows=rows) for n, rows in enumerate(own)]
        return PieceRows(
            pieces, shape, dtype, way_out="Run the same command again, and it is made anew"
        )

    def _do(self, name: str, function: Callable[[Any], Statistics], items: Sequence[Any]) -> Path:
        """Do this rank's share, and wait for the others'."""
        self._names[name] += 1
        again = self._names[name]
        folder = self._folder / (_slug(name) if again == 1 else f"{_slug(name)}-{again}")
        folder.mkdir(exist_ok=True)
        rank, ranks = self._process.rank, self._process.world_size
        mine = range(len(items) * rank // ranks, len(items) * (rank + 1) // ranks)
        self._progress.begin(name, len(mine))

        def do(number: int) -> None:
            path, item = _piece(folder, number), items[number]
            if read_piece(path, _described(item)) is None:
                write_piece(path, function(item), _described(item))
            self._progress.advance()

        if self._lanes == 1 or len(mine) == 1:
            for number in mine:
                do(number)
        else:
            _in_threads(do, mine, self._lanes)
        if ranks > 1:
            self._meet(folder)
        self._progress.end()
        return folder

    def _meet(self, folder: Path) -> None:
        """Say that this rank's share is done, and wait until all have said so."""
        mark = folder / f"done-{self._process.rank}"
        write_atomically(mark, self._attempt, durable=False)
        missing, pause = set(range(self._process.world_size)), _LOOKS[0]
        while missing:
            for rank in list(missing):
                if _text(folder / f"done-{rank}") == self._attempt:
                    missing.remove(rank)
                    continue  # what it did since then, the next step tells
                failure = _text(self._folder / f"failed-{rank}")
                if failure.startswith(self._attempt):
                    what = failure.removeprefix(self._attempt)
                    raise RankFailedError(f"rank {rank} failed with {what}")
            if missing:
                self._progress.wait(sorted(missing))
                time.sleep(pause)
                pause = min(2 * pause, _LOOKS[1])


def _in_threads(do: Callable[[int], None], numbers: Sequence[int], lanes: int) -> None:
    pool = ThreadPoolExecutor(lanes, thread_name_prefix="blocks")
    try:
        for done in [pool.submit(do, number) for number in numbers]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _lanes(memory: int) -> int:
    """How many blocks are worked on at once."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) // (ranks_here * torch.get_num_threads())
    return max(1, min(memory // BLOCK_COST, cores))


def _slug(name: str) -> str:
    """A step's folder: its name, in which tables' names may hold anything."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:100]
    return plain if plain == name else f"{plain}-{uuid.uuid5(uuid.NAMESPACE_OID, name).hex[:12]}"


def _piece(folder: Path, number: int) -> Path:
    return folder / f"{number:08}.safetensors"


def _described(item: object) -> str:
    return repr(item)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
