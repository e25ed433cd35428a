"""The two consoles of the command: results go to stdout, everything else to stderr."""

from __future__ import annotations

import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape

BOX = SIMPLE_HEAD
"""The frame of every table."""

WIDE = 200
"""Columns when the output is not a terminal: a piped table must not be folded at 80."""


class _Console(Console):
    """A console that leaves it to the command what happens when its reader has gone."""

    def on_broken_pipe(self) -> None:
        """Go on with the error in place of rich's exit code."""
        raise  # noqa: PLE0704 - called while the error is handled


def stdout() -> Console:
    """A console on the present stdout; made per call, as tests and pipes swap the stream."""
    return _Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDE, soft_wrap=True)


def stderr() -> Console:
    """A console on the present stderr."""
    return _Console(file=sys.stderr, width=None if sys.stderr.isatty() else WIDE, soft_wrap=True)


def fail(message: str) -> None:
    """Print one red error message on stderr."""
    stderr().print(f"[bold red]error:[/] [red]{escape(message)}[/]", highlight=False)
