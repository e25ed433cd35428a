"""What a person sees of a long piece of work: how far it is, and how long it will take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from embcomp.io.yaml_reading import listed

_FIRST, _EVERY = 5.0, 30.0  # seconds until something is said, and between two lines


class WorkProgress:
    """Says every half minute how far the first rank is with a step, and what it waits for.

    Args:
        label: what is done, for the lines.
        say: takes a line; silent on other ranks.
    """

    def __init__(self, label: str, say: Callable[[str], None]) -> None:
        self._label, self._say = label, say
        self._lock = threading.Lock()
        self._name, self._total, self._done = "", 0, 0
        self._begun = self._said = time.monotonic()

    def begin(self, name: str, total: int) -> None:
        """A step begins.

        Args:
            name: its name.
            total: blocks of it that this rank does.
        """
        self._name, self._total, self._done = name, total, 0
        self._begun = time.monotonic()
        self._said = self._begun - _EVERY + _FIRST

    def advance(self) -> None:
        """A block is done."""
        with self._lock:
            self._done += 1
            if not self._is_time():
                return
            seconds = time.monotonic() - self._begun
            left = seconds / self._done * (self._total - self._done)
        self._line(f"{self._done:,} of {self._total:,} blocks, {_time(left)} left")

    def wait(self, ranks: Sequence[int]) -> None:
        """This rank is done, and others are not."""
        if self._is_time():
            self._line(f"waits for rank {listed(map(str, ranks))}")

    def end(self) -> None:
        """The step is done on all ranks."""
        seconds = time.monotonic() - self._begun
        if seconds >= _FIRST:
            self._line(f"done in {_time(seconds)}")

    def _is_time(self) -> bool:
        if time.monotonic() - self._said < _EVERY:
            return False
        self._said = time.monotonic()
        return True

    def _line(self, text: str) -> None:
        self._say(f"{self._label}, {self._name}: {text}")


def _time(seconds: float) -> str:
    """A duration, to about two digits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
