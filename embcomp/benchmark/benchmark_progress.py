"""What a person sees while a benchmark goes on: a line for each training, and how long the rest takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.text import Text

from embcomp.io.live_console import LiveConsole, duration


class BenchmarkConsole(LiveConsole):
    """Prints a benchmark's progress on stderr.

    Args:
        enabled: whether to print at all.
        stream: where to print.
    """

    def __init__(self, *, enabled: bool, stream: TextIO | None = None) -> None:
        super().__init__(enabled=enabled, stream=stream)
        self._title = ""
        self._standing = ""

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
        self.draw(lambda: Text(f"{self._title}: {self._standing}; {len(running)} run here"))

    def ended(self, text: str) -> None:
        """Print the line of a training that has ended, and how far the benchmark is."""
        self.log(f"{text}; {self._standing}" if self._standing else text)
