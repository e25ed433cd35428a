"""Progress on stderr: what stands below on a terminal, drawn anew now and then, and lines above it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from typing_extensions import Self

_REFRESH = 1.0  # seconds


class LiveConsole:
    """A console whose last lines are drawn anew where it is a terminal, and left out elsewhere.

    Args:
        enabled: whether to print at all.
        stream: where to print; stderr by default.
    """

    def __init__(self, *, enabled: bool, stream: TextIO | None = None) -> None:
        self._enabled = enabled
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live: Live | None = None
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

    def draw(self, make: Callable[[], RenderableType]) -> None:
        """Draw what stands below, unless that was done a moment ago.

        Args:
            make: what to draw; called only if it is drawn.
        """
        if self._live is None or time.monotonic() - self._drawn < _REFRESH:
            return
        self._drawn = time.monotonic()
        self._live.update(make(), refresh=True)

    def log(self, text: str) -> None:
        """Print a line above it."""
        if self._enabled:
            self._console.print(escape(text))


def duration(seconds: float) -> str:
    """A time for people."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
