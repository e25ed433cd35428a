"""A folder of this machine for files that a task of `prepare` makes on its way, gone when it ends."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embcomp.io.remote_paths import RemotePath


@contextmanager
def local_scratch(wanted: Path) -> Iterator[Path]:
    """Make an empty folder that no other task has, which goes with the block.

    Args:
        wanted: where it would lie; it lies beside that, or among the system's temporary files where
            that is behind a URL.
    """
    if isinstance(wanted, RemotePath):
        with tempfile.TemporaryDirectory(prefix="embcomp-") as folder:
            yield Path(folder)
        return
    with tempfile.TemporaryDirectory(
        prefix=f"{wanted.name}-", suffix=".tmp", dir=wanted.parent
    ) as folder:
        yield Path(folder)
