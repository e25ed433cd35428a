"""Where a study lies: a journal file in the search's folder, or any database that Optuna reaches.

Whatever is wrong with it is said in one message at once, and nothing is changed by saying it.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection

from embcomp.errors import ConfigError, EmbcompError
from embcomp.search.trials.database import (
    LOCK_GRACE,
    LOCK_WAIT,
    StorageError,
    advice_on,
    open_database,
    without_password,
)

__all__ = [
    "JOURNAL",
    "JournalLock",
    "StorageError",
    "explained",
    "open_storage",
    "open_study",
    "without_password",
]

JOURNAL = "study.journal"
_IDENTITY = "embcomp"  # study attribute: what the search was when it began


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Open a storage, or says why not within a second.

    Args:
        url: a database URL; None takes the journal file in `folder`.
        folder: the search's folder.

    Raises:
        StorageError: it is locked, gone, not writable or not a study.
    """
    with explained(url, folder):
        return _open_journal(folder / JOURNAL) if url is None else open_database(url)


@contextmanager
def explained(url: str | None, folder: Path) -> Iterator[None]:
    """Turn a storage's errors into one message that says where it is and what to do."""
    where = without_password(url) if url else str(folder / JOURNAL)
    try:
        yield
    except EmbcompError:
        raise
    except Exception as error:
        if not _is_of_a_storage(error):
            raise
        reason = str(error.__cause__ or error).split("\n")[0]
        raise StorageError(
            f"storage {where}: {reason}; {advice_on(reason)}. Finished candidates are kept, and the same "
            "command goes on from them"
        ) from None


def open_study(
    storage: BaseStorage,
    name: str,
    directions: Sequence[str],
    sampler: BaseSampler,
    pruner: optuna.pruners.BasePruner,
    identity: Mapping[str, Any],
) -> optuna.Study:
    """Create a study, or join it if it is of the same search.

    Args:
        storage: where it lies.
        name: the study's name.
        directions: `maximize` or `minimize`, for each objective.
        sampler: proposes candidates.
        pruner: stops bad ones.
        identity: everything that candidates' scores depend on.

    Raises:
        ConfigError: the study began as another search; the text says what changed.
    """
    wanted = [StudyDirection[direction.upper()] for direction in directions]
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        directions=wanted,
        sampler=sampler,
        pruner=pruner,
        load_if_exists=True,
    )
    if study.directions != wanted:
        had = ", ".join(direction.name.lower() for direction in study.directions)
        raise ConfigError(_other(name, f"its objectives were {had}, now {', '.join(directions)}"))
    mine = json.loads(json.dumps(identity))
    if _IDENTITY not in study.user_attrs:
        study.set_user_attr(_IDENTITY, mine)
    known = study.user_attrs[_IDENTITY]  # of two that begin at once, one is heard
    if known != mine:
        raise ConfigError(_other(name, "; ".join(_changes(known, mine))))
    return study


def _other(name: str, changed: str) -> str:
    return (
        f"study {name!r} began as another search: {changed}. Nothing was changed; choose another "
        "name to begin anew, or restore what the study began with to go on"
    )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += [f"{key}.{change}" for change in _changes(before, after)]
        elif before != after:
            found.append(f"{key}: {_short(before)} -> {_short(after)}")
    return found


def _short(value: object) -> str:
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _open_journal(path: Path) -> BaseStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(13, "not writable", str(path))
    lock = JournalLock(path)
    if not lock.try_acquire(LOCK_WAIT):
        raise StorageError(
            f"storage {path} is locked by another process for longer than a write takes; wait, or "
            "end that process and start again. Nothing was changed"
        )
    try:
        _mend(path)
    finally:
        lock.release()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


class JournalLock(JournalFileOpenLock):
    """A lock that dies with its process: whoever is killed while writing keeps nobody waiting.

    Optuna's own locks are files that a killed process leaves behind, to be broken half a minute
    later.

    Args:
        path: the journal.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path.with_name(f"{path.name}.lock")
        self._file: int | None = None

    def acquire(self) -> bool:
        """Take the lock, or raise a StorageError when it stays taken."""
        if not self.try_acquire(LOCK_GRACE):
            raise StorageError(f"{self._path} has been held by another process for {LOCK_GRACE} s")
        return True

    def try_acquire(self, patience: float) -> bool:
        """Take the lock within some seconds, or return False."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(file)
                    return False
                time.sleep(0.01)
            else:
                self._file = file
                return True

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _mend(path: Path) -> None:
    """Cut off a last line that a dying machine left unfinished; it was never acknowledged."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)


def _is_of_a_storage(error: Exception) -> bool:
    names = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return isinstance(error, OSError | json.JSONDecodeError) or bool(
        names & {"sqlalchemy", "sqlite3", "psycopg", "psycopg2", "pymysql"}
        or isinstance(error, optuna.exceptions.StorageInternalError)
        or "Invalid log format" in str(error)
    )
