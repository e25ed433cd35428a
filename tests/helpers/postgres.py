"""A PostgreSQL of a test's own: a cluster in a temporary folder, on 127.0.0.1, gone afterwards."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def why_not() -> str | None:
    """What a machine lacks for it; None when nothing is."""
    if _binary("initdb") is None or _binary("pg_ctl") is None:
        return "PostgreSQL's initdb and pg_ctl are not installed (apt-get install postgresql)"
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed (pip install 'embcomp[postgres]')"
    return None


@contextmanager
def cluster() -> Iterator[str]:
    """A server's URL, without a database; skips where there can be none, but never in CI."""
    lacking = why_not()
    if lacking and os.environ.get("CI", "").lower() == "true":
        pytest.fail(lacking)
    if lacking:
        pytest.skip(lacking)
    # Not below pytest's folder, which nobody but its user may enter.
    home = Path(tempfile.mkdtemp(prefix="embcomp-postgres-"))
    owner = _owner()
    if owner is not None:
        os.chown(home, owner.pw_uid, owner.pw_gid)
    data, port = home / "data", _free_port()
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    try:
        _run("initdb", "-D", data, "-U", "embcomp", "--auth=trust", "--no-sync", "-E", "UTF8")
        _run("pg_ctl", "-D", data, "-w", "-l", home / "log", "-o", settings, "start")
        yield f"postgresql://embcomp@127.0.0.1:{port}"
    finally:
        if data.exists():
            _run("pg_ctl", "-D", data, "-m", "immediate", "stop", check=False)
        shutil.rmtree(home, ignore_errors=True)


def _run(name: str, *arguments: object, check: bool = True) -> None:
    binary, owner = _binary(name), _owner()
    assert binary is not None
    ended = subprocess.run(
        [str(binary), *map(str, arguments)],
        cwd="/",
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        stdout=subprocess.DEVNULL,  # a server that goes on would keep a pipe open
        stderr=subprocess.DEVNULL,
        user=None if owner is None else owner.pw_uid,
        group=None if owner is None else owner.pw_gid,
        extra_groups=None if owner is None else [],
        check=False,
    )
    assert not check or ended.returncode == 0, f"{name} ended with {ended.returncode}"


def _owner() -> pwd.struct_passwd | None:
    """Who runs the server: PostgreSQL refuses root. None is whoever runs the tests."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return pwd.getpwnam("postgres" if "postgres" in names else "nobody")


def _binary(name: str) -> Path | None:
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    # Debian keeps the server's programs off the path, by version.
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return found[-1] if found else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
