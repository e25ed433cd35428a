"""Text files as they lie on disk, plain or compressed, told apart by their first bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa

from embcomp.errors import DataError, one_line

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""Endings of names that say how a file is compressed, not what it holds."""
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive; unzip it first",
    b"PAR1": "a Parquet file; describe it in a schema YAML and use the `table` importer",
}


def compression(path: Path) -> str | None:
    """Return gzip, bzip2, xz, zstd or None (plain); other kinds of files are a DataError."""
    with reading(path), path.open("rb") as file:
        head = file.read(6)
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}")
    return next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)


def unpacked(disk: IO[bytes], kind: str | None) -> IO[bytes]:
    """Return the uncompressed bytes of an open file of a kind of `compression`."""
    if kind == "gzip":
        return gzip.GzipFile(fileobj=disk, mode="rb")  # type: ignore[return-value]
    if kind == "bzip2":
        return bz2.BZ2File(disk)
    if kind == "xz":
        return lzma.LZMAFile(disk)
    if kind == "zstd":
        return io.BufferedReader(_Zstd(disk))
    return disk


@contextmanager
def unpacking(path: Path, kind: str | None) -> Iterator[None]:
    """Name the file when it cannot be read, or its compressed stream ends early or is damaged."""
    try:
        with reading(path):
            yield
    except EOFError:
        raise DataError(
            f"{path} is a truncated {kind} file: it ends before its end-of-stream mark; copy or "
            f"download it again"
        ) from None
    except (zlib.error, gzip.BadGzipFile, lzma.LZMAError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is a damaged {kind} file ({one_line(error)}); fetch it again"
        ) from None
    except OSError as error:
        # bz2 and Arrow say that a stream is damaged by an OSError without a number.
        if kind is None or error.errno is not None:
            raise
        if "truncated" in str(error).lower():
            raise DataError(
                f"{path} is a truncated {kind} file ({one_line(error)}); copy or download it again"
            ) from None
        raise DataError(
            f"{path} is a damaged {kind} file ({one_line(error)}); fetch it again"
        ) from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of a file that cannot be opened or read what the system says about it."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} does not exist") from None
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(f"cannot read {path}: {error.strerror or one_line(error)}") from None


class _Zstd(io.RawIOBase):
    """A zstd stream: Arrow's, as Python has none before 3.14."""

    def __init__(self, disk: IO[bytes]) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(disk, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
