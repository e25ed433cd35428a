"""The `embcomp` command. One file per verb; each only parses and prints, libraries do the work."""

from __future__ import annotations

import os
import sys

from embcomp.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the `embcomp` command."""
    try:
        app()
    except SystemExit as stop:
        if "torchrec" in sys.modules:
            # A process that trained sharded tables aborts now and then while the interpreter
            # shuts down. Everything is written by now, so it does not shut down.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        raise
