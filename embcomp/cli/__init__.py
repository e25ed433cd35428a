"""The `embcomp` command. One file per verb; each only parses and prints, libraries do the work."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from embcomp.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the `embcomp` command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the command
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    try:
        app()
    except SystemExit as stop:
        if "torchrec" in sys.modules:
            # A process that trained sharded tables aborts now and then while the interpreter
            # shuts down. Everything is written by now, so it does not shut down.
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        raise
