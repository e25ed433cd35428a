"""Digests of a dataset's files and of its description."""

from __future__ import annotations

import hashlib
import io
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import override

_MAGIC = b"PAR1"
# A Parquet file ends with its footer, the footer's length in 4 bytes, and the magic word.
_TAIL = 8
_PIECE = 1 << 20


def sha256_of_json(content: object) -> str:
    """Return the SHA-256 of plain JSON values, however they are laid out in a file."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def footer_sha256(path: Path) -> str:
    """Return the SHA-256 of the end of a Parquet file, which says where every page lies.

    A file that has no footer gives the digest of its last bytes, which is that of no footer.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _TAIL))
        tail = file.read()
        length = int.from_bytes(tail[:4], "little") + _TAIL if tail[4:] == _MAGIC else _TAIL
        file.seek(max(0, size - length))
        return hashlib.sha256(file.read()).hexdigest()


class HashedReading(io.RawIOBase):
    """An open file that is read once, from its start, and the digest of all of it.

    Large pieces are hashed in a thread, while the caller works on what it has read.

    Args:
        file: the file, at its start; it stays open.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embcomp-digest")
        self._hashing: Future[None] | None = None

    @override
    def readable(self) -> bool:
        return True

    @override
    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._take(data)
        return data

    @override
    def readinto(self, buffer: Any) -> int:
        come = int(self._file.readinto(buffer))  # type: ignore[attr-defined]
        self._take(memoryview(buffer)[:come])
        return come

    @override
    def readline(self, size: int | None = -1) -> bytes:
        line = self._file.readline(-1 if size is None else size)
        self._take(line)
        return line

    @override
    def tell(self) -> int:
        return self._file.tell()

    def sha256(self) -> str:
        """The SHA-256 of the file; what nobody read of it is read now."""
        while self.read(_PIECE):
            pass
        self._wait()
        self._thread.shutdown()
        return self._digest.hexdigest()

    def _take(self, data: bytes | memoryview) -> None:
        self._wait()
        if len(data) < _PIECE:
            self._digest.update(data)
        else:
            # The caller writes into its buffer again.
            self._hashing = self._thread.submit(self._digest.update, bytes(data))

    def _wait(self) -> None:
        hashing, self._hashing = self._hashing, None
        if hashing is not None:
            hashing.result()


class HashedFile(io.RawIOBase):
    """A new file whose digest is known when the last byte is written.

    Attributes:
        bytes: written so far.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        """The SHA-256 of what was written so far."""
        return self._digest.hexdigest()

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, data: Any) -> int:
        self._digest.update(data)
        written = self._file.write(data)
        self.bytes += written
        return written

    @override
    def tell(self) -> int:
        return self.bytes

    @override
    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    @override
    def close(self) -> None:
        if not self.closed:
            try:
                self._file.close()
            finally:
                super().close()
