"""What a person sees while a benchmark goes on: a line for each training, and how long the rest takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text
from typing_extensions import Self

from embcomp.search.trials.trial_progress import duration

_REFRESH = 1.0  # seconds


class BenchmarkConsole:
    """Prints a benchmark's progress on stderr.

    Args:
        enabled: whether to print at all.
        stream: where to print.
    """

    def __init__(self, *, enabled: bool, stream: TextIO | None = None) -> None:
        self._enabled = enabled
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._title = ""
        self._standing = ""
        self._drawn = 0.0

    def __enter__(self) -> Self:
        if self._enabled and self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, title: str) -> None:
        """Say what follows."""
        self._title = title
        self.log(title)

    def stand(self, ended: int, planned: int, seconds: float, slots: int) -> None:
        """Say how far it is.

        Args:
            ended: trainings of the whole benchmark that have ended.
            planned: trainings that it will have, as far as is known.
            seconds: what the rest takes, added up.
            slots: how many run at once here.
        """
        left = f", about {duration(seconds / max(1, slots))} left" if planned > ended else ""
        self._standing = f"{ended} of {planned} trainings ended{left}"

    def update(self, running: Sequence[int]) -> None:
        """Draw the line that stands below, unless that was done a moment ago."""
        if self._live is None or time.monotonic() - self._drawn < _REFRESH:
            return
        self._drawn = time.monotonic()
        here = f"{len(running)} run here"
        self._live.update(Text(f"{self._title}: {self._standing}; {here}"), refresh=True)

    def log(self, text: str) -> None:
        """Print a line."""
        if self._enabled:
            self._console.print(escape(text))

    def ended(self, text: str) -> None:
        """Print the line of a training that has ended, and how far the benchmark is."""
        self.log(f"{text}; {self._standing}" if self._standing else text)
