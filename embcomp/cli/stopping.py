"""Ctrl-C, SIGTERM, a closed stdout and defects: one message each, and the usual exit codes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import typer

from embcomp.cli import consoles as console

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the signal's number."""
TERMINATED = 143
"""Exit code after SIGTERM."""
PIPE_CLOSED = 141
"""Exit code when who reads stdout has gone, as of a program that SIGPIPE ends."""
DEBUG = "EMBCOMP_DEBUG"
"""Environment variable that lets the traceback of a defect through."""


class Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def raising_sigterm() -> Iterator[None]:
    """Lets SIGTERM unwind the stack as Ctrl-C does, so that what is half made is cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends at once
        if os.getpid() != own:  # a fork, which is to end as it would have
            os.kill(os.getpid(), number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stoppable(standing: Callable[[], str]) -> Iterator[None]:
    """Says where the work of a verb stands when it is stopped, and exits as stopped programs do.

    Args:
        standing: where the work stands and how to go on.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        say_stopped(stop, standing())
        raise typer.Exit(exit_code(stop)) from None


def exit_code(stop: BaseException) -> int:
    """The exit code of a stopped program."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def say_stopped(stop: BaseException, standing: str) -> None:
    """Print why the program ends and where its work stands; of several ranks the first does."""
    if os.environ.get("RANK", "0") != "0":
        return
    why = "stopped by SIGTERM" if isinstance(stop, Terminated) else "interrupted"
    with suppress(OSError):  # the terminal may have gone with the signal
        console.fail(f"{why}; {standing}")


def leave_stdout() -> None:
    """Give up a stdout that cannot be written, so that no later flush complains about it."""
    with suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


def describe_defect(error: BaseException) -> str:
    """One line for an exception that no one foresaw: what it is, where, and how to see more."""
    text = " ".join(str(error).split())
    shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return (
        f"unexpected {shown[:500]} ({_place_of(error)}). This is a defect of embcomp or of a "
        f"library: {DEBUG}=1, or `embcomp --traceback VERB ...`, shows the traceback for a report"
    )


def _place_of(error: BaseException) -> str:
    """The innermost line of ours that an exception passed, else its innermost line."""
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).resolve().parent.parent
    folders = [root, *(path.resolve() for path in root.iterdir() if path.is_symlink())]
    own = [
        f for f in frames if any(folder in Path(f.filename).resolve().parents for folder in folders)
    ]
    if not frames:
        return "at an unknown place"
    frame = (own or frames)[-1]
    path = Path(frame.filename)
    return f"at {path.parent.name}/{path.name}, line {frame.lineno}"
