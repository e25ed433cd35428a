"""Run an iterator ahead in a background thread: by up to `depth` items, or by exactly one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.1


class _End:
    """What the thread sends last: the error that stopped it, if any."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yield `items` in order while a thread makes up to `depth` of them in advance.

    An error in `items` is raised where its item would have come. Closing the generator, or leaving
    it to the garbage collector, stops the thread.
    """
    ready: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: T | _End) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return

    def work() -> None:
        error = None
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
        except BaseException as raised:  # noqa: BLE001 - handed to the consumer, not swallowed
            error = raised
        put(_End(error))

    thread = threading.Thread(target=work, name="embcomp-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items of an iterator, taking each from it in a thread, one ahead of its use.

    Never more than one: `prepare` counts its memory by that, where `prefetch(depth=1)` may hold two.
    """
    end: list[T] = []
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
