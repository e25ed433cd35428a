"""The compiled look-up: built once on a machine that has a compiler, and kept in the user's cache.

It has no dependency on torch's headers, so that it builds in a second or two and works with any torch.
The file's name is a digest of what it was made from, so that another version, compiler or processor
never meets a library that was made for this one. Calls release the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from importlib import resources
from pathlib import Path

KERNEL = "EMBCOMP_KERNEL"
"""The environment variable that turns the compiled look-up off (`off`)."""
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-march=native", "-fopenmp")
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 120


class MissingKernelError(Exception):
    """Why there is no compiled look-up on this machine."""


@lru_cache
def library() -> ctypes.CDLL:
    """The compiled look-up, built where it is not there yet.

    Raises:
        MissingKernelError: it is turned off, there is no compiler, or it failed; in one line.
    """
    if os.environ.get(KERNEL, "").lower() in ("off", "0"):
        raise MissingKernelError(f"{KERNEL} turns it off")
    compiler = _compiler()
    path = cache_folder() / f"lookup-{_digest(compiler)}.so"
    try:
        if not path.exists():
            _build(compiler, path)
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingKernelError(f"{path} cannot be used: {error.strerror or error}") from None
    return _declared(found)


def why_missing() -> str | None:
    """Why look-ups are not compiled here; None where they are."""
    try:
        library()
    except MissingKernelError as missing:
        return str(missing)
    return None


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


def _source() -> bytes:
    return resources.files("embcomp.serving.fused").joinpath("kernel.cpp").read_bytes()


def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [_source(), " ".join(_FLAGS).encode(), compiler.encode(), version, _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _processor() -> bytes:
    """What `-march=native` depends on."""
    described = Path("/proc/cpuinfo")
    lines = described.read_bytes().splitlines() if described.exists() else []
    wanted = (b"model name", b"flags", b"Features", b"CPU part")
    known = sorted({line for line in lines if line.startswith(wanted)})
    return b"\n".join([platform.machine().encode(), *known])


def _build(compiler: str, path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, built = Path(folder) / "kernel.cpp", Path(folder) / "lookup.so"
        source.write_bytes(_source())
        command = [compiler, *_FLAGS, str(source), "-o", str(built)]
        try:
            made = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise MissingKernelError(f"{compiler} took more than {_SECONDS} s") from None
        if made.returncode:
            said = " ".join(made.stderr.decode("utf-8", "replace").split())[:300]
            raise MissingKernelError(f"{compiler} failed: {said}")
        built.replace(path)


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    found.embcomp_lookup.argtypes = [*[pointer] * 5, integer, pointer, ctypes.c_int32]
    found.embcomp_lookup.restype = ctypes.c_int32
    found.embcomp_program_bytes.restype = integer
    found.embcomp_step_bytes.restype = integer
    found.embcomp_feature_bytes.restype = integer
    return found
