"""Files that are there whole or not at all, whoever else writes them."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from embcomp.io.folder_lock import is_at, try_lock
from embcomp.io.remote_paths import RemotePath


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a whole file or nothing; of several writers at once, one is the last.

    Args:
        path: the file.
        text: what it is to hold.
        durable: whether it is forced to disk first.
    """
    with _renamed(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A file to write, which becomes `path` when the block ends, and is gone when it fails.

    Args:
        path: what is written, in a folder that is there.
        durable: whether the bytes are forced to disk before the file takes its name, so that a
            power cut leaves the old file or the new one, and what killed writers left goes first.
            Not for the many files of a folder whose owner removes `*.tmp` and checks digests.
    """
    if durable and not isinstance(path, RemotePath):
        _remove_leftovers(path)
    with _renamed(path, durable=durable) as temporary:
        yield temporary


@contextmanager
def _renamed(path: Path, *, durable: bool) -> Iterator[Path]:
    """Each writer has a name of its own, as workers of a search may end at the same moment.

    It holds a lock on its file, which tells that from what killed writers left. What lies behind a URL
    is written here and goes there as a whole.
    """
    if isinstance(path, RemotePath):
        with path.written() as temporary:
            yield temporary
        return
    temporary, handle = _locked_file(path)
    try:
        yield temporary
        if durable:
            _force_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left anywhere in a folder, and nothing of writers that live."""
    _remove_dead(folder.rglob(".*.tmp"), r".*")


def _remove_leftovers(path: Path) -> None:
    _remove_dead(path.parent.iterdir(), re.escape(path.name))


def _remove_dead(entries: Iterable[Path], name: str) -> None:
    """On a file system without locks nothing is removed."""
    leftover = re.compile(rf"\.{name}\.[0-9a-f]{{32}}\.tmp")
    for entry in entries:
        if leftover.fullmatch(entry.name) is None:
            continue
        try:
            handle = os.open(entry, os.O_RDONLY)
        except OSError:
            continue  # its writer was done, or it is not ours to open
        try:
            if try_lock(handle):
                entry.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _locked_file(path: Path) -> tuple[Path, int]:
    """A new file and the handle that locks it.

    Until it is locked, another writer may take it for left behind: then there is another.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if try_lock(handle) is not False and is_at(handle, temporary):
            return temporary, handle
        os.close(handle)


def _force_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
