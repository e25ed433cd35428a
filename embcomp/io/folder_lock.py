"""A lock on a folder, which the system drops when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def folder_lock(path: Path, *, busy: Exception | None) -> Iterator[None]:
    """Keep other processes out; on a file system without locks, do nothing.

    Args:
        path: a folder that is there, or a file to lock for it, which is made.
        busy: raised when another process is in there; None waits until it has gone.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    handle = os.open(path, flags, 0o666)
    try:
        if busy is None:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        elif try_lock(handle) is False:
            raise busy
        yield
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool | None:
    """Whether the lock was free, and is held now; None on a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_at(handle: int, path: str | Path) -> bool:
    """Whether an open file or folder is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), Path(path).stat())
    except FileNotFoundError:
        return False
