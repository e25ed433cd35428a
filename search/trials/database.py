"""A study in a database: how it is opened when many workers open it at once, and what goes wrong.

The first worker makes the tables and all others find them. Optuna does that without a lock, so that
of several workers that start together some would fail on what others have just made: here they go
one by one, behind a lock of the database's own or beside its file, and who fails all the same looks
again.
"""

from __future__ import annotations

import fcntl
import random
import sqlite3
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import SQLAlchemyError

from embcomp.errors import EmbcompError, one_line

POSTGRES = "pip install 'embcomp[postgres]'"
LOCK_WAIT = 0.7  # seconds that a lock may be held before it is named
LOCK_GRACE = 30.0  # seconds that a running search waits for a lock
_ATTEMPTS = 8  # at a database that others are making, too
_KEY = zlib.crc32(b"embcomp study")  # of the lock in PostgreSQL
_CREATED_MEANWHILE = ("already exists", "duplicate key", "unique constraint", "alembic_version")


class StorageError(EmbcompError):
    """A study's storage that cannot be used now."""


def open_database(url: str) -> BaseStorage:
    """Open a database, its tables made if they are not there.

    Raises:
        StorageError: its driver is not installed, or its tables are another version's.
    """
    address = with_driver(make_url(url))
    try:
        with warnings.catch_warnings(), _one_by_one(address):
            warnings.simplefilter("ignore")
            return _made(address)
    except ImportError as error:
        hint = f"; {POSTGRES}" if address.get_backend_name() == "postgresql" else ""
        raise StorageError(
            f"storage {without_password(url)}: its driver is not installed: {one_line(error)}{hint}"
        ) from None
    except RuntimeError as error:
        if "table schema" not in str(error):
            raise
        raise StorageError(f"storage {without_password(url)}: {one_line(error)}") from None


def with_driver(address: URL) -> URL:
    """The URL with the driver that our extra installs, where it names none."""
    if address.drivername in ("postgresql", "postgres"):
        return address.set(drivername="postgresql+psycopg")
    return address


def without_password(url: str) -> str:
    """A database URL that can be printed."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return url


def _made(address: URL) -> BaseStorage:
    """Optuna's storage; a failure while others make the same tables is worth another look."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            sqlite = address.get_backend_name() == "sqlite"
            storage = RDBStorage(
                address.render_as_string(hide_password=False),
                engine_kwargs={"connect_args": {"timeout": LOCK_GRACE} if sqlite else {}},
            )
            if sqlite:
                _lock_before_reading(storage.engine)
            return storage
        except (SQLAlchemyError, StorageInternalError) as error:
            text = f"{error} {error.__cause__}".lower()
            if attempt == _ATTEMPTS or not any(part in text for part in _CREATED_MEANWHILE):
                raise
            time.sleep(random.uniform(0.05, 0.2) * attempt)
    raise AssertionError("the last attempt returns or raises")


def _lock_before_reading(engine: Engine) -> None:
    """Make every transaction of a SQLite take the write lock first.

    Python's driver takes it at the first change only. Two workers then both read that a candidate
    waits and both take it, or one finds too late that another writes, and fails instead of waiting.
    """

    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions of its own

    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", connect)
    sqlalchemy.event.listen(engine, "begin", begin)
    engine.dispose()


@contextmanager
def _one_by_one(address: URL) -> Iterator[None]:
    """Holds the lock behind which a database's tables are made."""
    backend = address.get_backend_name()
    if backend == "sqlite" and address.database not in (None, "", ":memory:"):
        with _file_lock(Path(str(address.database))):
            yield
    elif backend == "postgresql":
        engine = sqlalchemy.create_engine(address)
        try:
            with engine.connect() as connection:  # the lock ends with the connection
                connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({_KEY})"))
                yield
        finally:
            engine.dispose()
    else:
        yield


@contextmanager
def _file_lock(database: Path) -> Iterator[None]:
    try:
        file = database.with_name(f"{database.name}.lock").open("a")
    except OSError:  # SQLite says best what is wrong with the folder
        _probe_sqlite(database)
        yield
        return
    with file:
        _wait_for_lock(file, database)
        _probe_sqlite(database)
        yield


def _wait_for_lock(file: IO[str], database: Path) -> None:
    deadline = time.monotonic() + LOCK_GRACE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"storage {database}: another worker has been opening it for "
                    f"{LOCK_GRACE:.0f} s; end that, or start again. Nothing was changed"
                ) from None
            time.sleep(0.02)
        except OSError:  # a file system without locks: who fails there looks again
            return


def _probe_sqlite(path: Path) -> None:
    """Take the write lock once: a locked database shows now, not after half a minute.

    While it changes, other workers are at it, and are waited for.
    """
    begun = seen_at = time.monotonic()
    seen = 0
    while True:
        with closing(sqlite3.connect(path, timeout=0.05, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                now, changed = time.monotonic(), path.stat().st_mtime_ns
                if changed != seen:
                    seen, seen_at = changed, now
                if now - seen_at > LOCK_WAIT or now - begun > LOCK_GRACE:
                    raise


def advice_on(reason: str) -> str:
    """What to do about a database's message."""
    text = reason.lower()
    if "locked" in text:
        return "another program holds it; close that, or wait"
    if any(part in text for part in _CREATED_MEANWHILE):
        return "another worker was making its tables at the same time; start the same command again"
    if any(part in text for part in ("connection", "connect to", "could not translate", "timeout")):
        return "check that the server runs, and the URL's host, port, user and database"
    if "full" in text or "no space" in text:
        return "make room, and start the same command again"
    return "check that it is there and writable"
