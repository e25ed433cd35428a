"""Compiled code: built once on a machine that has a compiler, and kept in the user's cache.

Sources are single C++ files beside Python modules, without torch's headers, so that they build in a second
or two and work with any torch. The file's name is a digest of what it was made from, so that another
version, compiler or processor never meets a library that was made for this one. Calls through `ctypes`
release the interpreter's lock. Whoever uses compiled code has a way without.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

KERNEL = "EMBCOMP_KERNEL"
"""The environment variable that turns compiled code off (`off`)."""
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-march=native", "-fopenmp")
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 120


Functions = Mapping[str, tuple[Any, Sequence[Any]]]
"""By name: the type of what a function returns, and those of what it takes."""


class MissingKernelError(Exception):
    """Why there is no compiled code on this machine."""


def compiled_library(package: str, source: str, *, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """A C++ file as a library, built where it is not there yet.

    Args:
        package: the package that the file is in.
        source: its name, which ends in `.cpp`.
        flags: of the compiler, beside those that all have.

    Raises:
        MissingKernelError: it is turned off, there is no compiler, or it failed; in one line.
    """
    if os.environ.get(KERNEL, "").lower() in ("off", "0"):
        raise MissingKernelError(f"{KERNEL} turns it off")
    compiler, text = _compiler(), resources.files(package).joinpath(source).read_bytes()
    command = [compiler, *_FLAGS, *flags]
    path = cache_folder()
    try:
        path /= f"{Path(source).stem}-{_digest(command, text)}.so"
        if not path.exists():
            _build(command, text, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingKernelError(f"{path} cannot be used: {error.strerror or error}") from None


def optional_library(
    package: str, source: str, functions: Functions, *, flags: Sequence[str] = ()
) -> ctypes.CDLL | None:
    """A C++ file as a library with its functions declared; None where it cannot be, which costs speed alone.

    Args:
        package: the package that the file is in.
        source: its name, which ends in `.cpp`.
        functions: all that is called.
        flags: of the compiler, beside those that all have.
    """
    try:
        found = compiled_library(package, source, flags=flags)
    except MissingKernelError:
        return None
    for name, (result, arguments) in functions.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def cache_folder() -> Path:
    """Where built libraries lie: a folder of the user's alone."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "embcomp"


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise MissingKernelError(
        f"no C++ compiler: {named or ', '.join(_COMPILERS)} is not on the path; install one (Debian: "
        "g++), or set CXX"
    )


def _digest(command: Sequence[str], source: bytes) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, check=False).stdout
    parts = [source, " ".join(command).encode(), version, _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _processor() -> bytes:
    """What `-march=native` depends on."""
    described = Path("/proc/cpuinfo")
    lines = described.read_bytes().splitlines() if described.exists() else []
    wanted = (b"model name", b"flags", b"Features", b"CPU part")
    known = sorted({line for line in lines if line.startswith(wanted)})
    return b"\n".join([platform.machine().encode(), *known])


def _build(command: Sequence[str], text: bytes, path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, built = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        source.write_bytes(text)
        try:
            made = subprocess.run(
                [*command, str(source), "-o", str(built)],
                capture_output=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MissingKernelError(f"{command[0]} took more than {_SECONDS} s") from None
        if made.returncode:
            said = " ".join(made.stderr.decode("utf-8", "replace").split())[:300]
            raise MissingKernelError(f"{command[0]} failed: {said}")
        built.replace(path)
