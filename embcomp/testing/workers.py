"""A few processes that stay alive and run functions together, as the ranks of a process group.

Starting a process costs seconds (most of it importing torchrec); handing it a function does not.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

GROUP_TIMEOUT = timedelta(seconds=30)
"""How long a rank waits for the others within one collective operation."""

_GRACE_SECONDS = 5.0  # for the other ranks to report too, once one has failed


class RanksFailed(AssertionError):  # noqa: N818, reads as what happened
    """At least one rank raised; the text holds what every rank had to say."""


class WorkerPool:
    """Processes on this machine that run a function as the ranks of a gloo process group.

    Functions are sent by reference, so they live at the top level of an importable module; their
    arguments and results are pickled. Workers start on first use. After a failure they are ended,
    and the next run starts new ones: nothing of a broken process group survives.

    Args:
        size: the largest world size that can be asked for.

    Example::

        with WorkerPool(size=2) as pool:
            print(pool.run(2, platform.node))
    """

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._ready: set[Connection] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="embcomp-workers-")
        self._numbers = itertools.count()
        self._group: tuple[int, str] | None = None  # world size, rendezvous file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0
    ) -> list[Any]:
        """Call `function(*args)` on every rank of a world.

        Args:
            world_size: number of ranks, at most the pool's size.
            function: called inside an initialised process group of that size.
            *args: the same for every rank.
            timeout: seconds after which the ranks are given up.

        Returns:
            What each rank returned, by rank.

        Raises:
            RanksFailed: when a rank raised, died or did not answer; all tracebacks are in it.
        """
        if not 1 <= world_size <= self._size:
            raise ValueError(f"expected a world size in [1, {self._size}], got {world_size}")
        self._start(world_size)
        if self._group is None or self._group[0] != world_size:
            file = Path(self._folder.name) / f"group{next(self._numbers)}"
            self._group = (world_size, file.as_uri())
        message = pickle.dumps((self._group, function, args))
        connections = self._connections[:world_size]
        for connection in connections:
            connection.send_bytes(message)
        answers = self._collect(connections, timeout)
        failures = {rank: text for rank, (ok, text) in enumerate(answers) if not ok}
        if failures:
            self._kill()
            told = "\n".join(f"--- rank {rank} ---\n{text}" for rank, text in failures.items())
            raise RanksFailed(f"{len(failures)} of {world_size} ranks failed\n{told}")
        return [value for _, value in answers]

    def close(self) -> None:
        """End the workers; the pool can be used again."""
        for connection in self._connections:
            try:
                connection.send_bytes(pickle.dumps(None))
            except OSError:
                continue
        for process in self._processes:
            process.join(timeout=_GRACE_SECONDS)
        self._kill()

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._processes) < count:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, len(self._processes)), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        # None may wait in the process group for one that is still importing.
        for connection in self._connections:
            if connection not in self._ready:
                ok, value = _receive(connection)
                if not ok:
                    self._kill()
                    raise RanksFailed(f"a worker did not start: {value}")
                self._ready.add(connection)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections, self._group = [], [], None
        self._ready.clear()

    def _collect(self, connections: list[Connection], timeout: float) -> list[tuple[bool, Any]]:
        answers: dict[Connection, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(connections):
            waiting = [connection for connection in connections if connection not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in waiting:
                if connection in ready:
                    answers[connection] = _receive(connection)
                    if not answers[connection][0]:
                        deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        silent = (False, "no answer: it waited for the others or was busy, and was ended")
        return [answers.get(connection, silent) for connection in connections]


def _receive(connection: Connection) -> tuple[bool, Any]:
    try:
        ok, value = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        return False, "the process died without a word"
    return ok, value


def _serve(connection: Connection, rank: int) -> None:
    """A worker's life: receive, run, answer, until told to leave."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["LOCAL_RANK"] = str(rank)
    import torch
    import torch.distributed as dist
    from torchrec.distributed.collective_utils import init_collective_validation

    torch.set_num_threads(1)
    # TorchRec broadcasts this setting once in a process's life. Workers that join a world at
    # different times would wait for each other for ever, so each settles it alone.
    dist.init_process_group(
        "gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
    )
    init_collective_validation(dist.group.WORLD)
    connection.send_bytes(pickle.dumps((True, None)))
    group: tuple[int, str] | None = None
    while True:
        try:
            message = pickle.loads(connection.recv_bytes())
        except EOFError:  # the parent is gone
            break
        except Exception:  # noqa: BLE001, whatever it was, the parent must hear of it
            connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
            continue
        if message is None:
            break
        wanted, function, args = message
        try:
            if wanted != group:
                _join(wanted[0], wanted[1], rank)
                group = wanted
            torch.manual_seed(0)
            answer = pickle.dumps((True, function(*args)))
            dist.barrier()
        except BaseException:  # noqa: BLE001, the same
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)
    # A process that ran a sharded backward may abort in its destructors, so it runs none.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _join(world_size: int, file: str, rank: int) -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=file, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT
    )
