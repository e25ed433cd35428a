"""Hidden folders that become a result when they are complete, and what killed processes leave of them.

Whoever writes one holds a lock on it for as long as it lives. The system drops the lock when a
process ends, however it ends; so an unlocked folder has no owner and may go, and a locked one is
never touched. On a file system without locks nothing is removed.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embcomp.io.folder_lock import is_at, try_lock

_SUFFIX = ".unfinished"
_NAME = re.compile(r"\..+\.[a-z0-9_]{8}" + re.escape(_SUFFIX))


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """A locked hidden folder beside `path`, gone afterwards unless it was renamed.

    Args:
        path: what it is to become.
    """
    folder, handle = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def remove_unfinished(parent: Path) -> None:
    """Remove the unfinished folders in `parent` whose writers are gone."""
    for folder in parent.glob(f".*{_SUFFIX}"):
        if _NAME.fullmatch(folder.name) is None or folder.is_symlink() or not folder.is_dir():
            continue
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:
            continue  # another process was faster, or it is not ours to open
        try:
            if try_lock(handle):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new folder and the handle that locks it.

    Until it is locked, someone who cleans up may take it for left behind: then there is another.
    """
    while True:
        name = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)
        try:
            handle = os.open(name, os.O_RDONLY)
        except FileNotFoundError:
            continue
        if try_lock(handle) is not False and is_at(handle, name):
            return Path(name), handle
        os.close(handle)
