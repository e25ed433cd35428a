"""Notices a rank that died, and stops the others with its number.

A collective operation with a dead rank fails with an address, or waits for minutes. So every rank
shows a sign of life in the process group's store, and watches the others' in a thread of its own.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from embcomp.training.distributed.process import Process, launched_by_torchrun

EXIT_CODE = 13
"""Exit status of a process that stops because another rank died."""

_INTERVAL = 1.0
_DONE = "done"
_WATCHES = itertools.count()  # a process may train more than once; each watch has keys of its own


class RankFailedError(RuntimeError):
    """Another rank of the run died or raised; the text has its number."""


@contextmanager
def watch_ranks(process: Process, timeout: float) -> Iterator[None]:
    """Run a block on every rank; when one fails, the others stop with its number.

    A process that is stuck inside a collective operation cannot raise any more: it prints the
    reason and exits with `EXIT_CODE`. One whose operation failed raises `RankFailedError`.

    Args:
        process: the process group, as torchrun started it.
        timeout: seconds without a sign of life after which a rank counts as dead.
    """
    if process.world_size == 1 or not launched_by_torchrun():
        yield
        return
    watch = _Watch(process, timeout)
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.explain(error)
        raise
    else:
        watch.finish()


class _Watch:
    def __init__(self, process: Process, timeout: float) -> None:
        self._process = process
        self._timeout = timeout
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="embcomp-watch", daemon=True)
        # A connection of its own: the process group's is busy while an operation waits.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))
        self._store = PrefixStore(f"embcomp-watch-{next(_WATCHES)}", store)
        self._beats: dict[int, tuple[int, float]] = {}
        self._store_answered = time.monotonic()

    def start(self) -> None:
        """Show the first sign of life, waits for everyone's, then watches."""
        self._beat()
        dist.barrier()
        self._thread.start()

    def finish(self) -> None:
        """End the watch; the others no longer expect a sign of life."""
        self._end_with(_DONE)
        self._stop.set()
        self._thread.join()

    def explain(self, error: BaseException) -> None:
        """Raise what stopped another rank, or tells the others what stopped this one."""
        self._stop.set()
        self._thread.join()
        if isinstance(error, RuntimeError) and _is_of_a_collective(error):
            deadline = time.monotonic() + self._timeout + 2 * _INTERVAL
            while time.monotonic() < deadline:
                culprit = self._find_culprit()
                if culprit is not None:
                    raise RankFailedError(culprit) from error
                time.sleep(_INTERVAL / 4)
                self._beat()
        self._end_with(f"{type(error).__name__}: {error}".split("\n")[0])

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._beat()
            culprit = self._find_culprit()
            # The main thread may be about to raise by itself, which ends in better order.
            if culprit is not None and not self._stop.wait(5 * _INTERVAL):
                print(f"rank {self._process.rank} stops: {culprit}", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)

    def _find_culprit(self) -> str | None:
        now = time.monotonic()
        try:
            for rank in range(self._process.world_size):
                if rank == self._process.rank:
                    continue
                end = self._end_of(rank)
                if end not in (None, _DONE):
                    return f"rank {rank} failed with {end}"
                beat = self._store.add(f"beat-{rank}", 0)
                known, since = self._beats.get(rank, (-1, now))
                if end == _DONE or beat != known:
                    self._beats[rank] = (beat, now)
                elif now - since > self._timeout:
                    return f"rank {rank} died: no sign of life for {now - since:.0f} s"
            self._store_answered = now
        except RuntimeError:
            if now - self._store_answered > self._timeout:
                return "rank 0 or its launcher died: the store that it holds does not answer"
        return None

    def _end_of(self, rank: int) -> str | None:
        key = f"end-{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _beat(self) -> None:
        with suppress(RuntimeError):  # _find_culprit judges a store that does not answer
            self._store.add(f"beat-{self._process.rank}", 1)

    def _end_with(self, text: str) -> None:
        with suppress(RuntimeError):
            self._store.set(f"end-{self._process.rank}", text)


def _is_of_a_collective(error: RuntimeError) -> bool:
    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "socket", "peer", "timed out", "store")
    return any(word in text for word in words)
