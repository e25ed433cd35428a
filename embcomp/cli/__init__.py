"""The `embcomp` command. One file per verb; each only parses and prints, libraries do the work."""

from __future__ import annotations

from embcomp.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the `embcomp` command."""
    app()
