"""Text files, plain or gzipped, as blocks of whole lines."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl

from embcomp.data_pipelines.importers.base import (
    BadRow,
    Block,
    FileIndex,
    Layout,
    RawFile,
    RawTable,
    Rows,
)
from embcomp.errors import DataError

BLOCK_BYTES = 4 << 20
_READ = 1 << 20
_LONGEST_LINE = 64 << 20
_FOREIGN = {
    b"PK\x03\x04": "a zip archive; unzip it first",
    b"BZh": "bzip2-compressed; recompress it with gzip or unpack it",
    b"\xfd7zXZ": "xz-compressed; recompress it with gzip or unpack it",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; recompress it with gzip or unpack it",
    b"PAR1": "a Parquet file; describe it in a schema YAML and use the `table` importer",
}


def is_gzip(path: Path) -> bool:
    """Tell by its first bytes whether a file is gzipped; other archives are a DataError."""
    try:
        with path.open("rb") as file:
            head = file.read(6)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}")
    return head.startswith(b"\x1f\x8b")


@contextmanager
def gzip_errors(path: Path) -> Iterator[None]:
    """Name the file when its gzip stream ends early or is damaged."""
    try:
        yield
    except EOFError:
        raise DataError(
            f"{path} is a truncated gzip file: it ends before its end-of-stream mark; copy or "
            f"download it again"
        ) from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}); fetch it again") from None


def open_text(path: Path) -> IO[bytes] | gzip.GzipFile:
    """Open a file for reading its uncompressed bytes."""
    return gzip.open(path, "rb") if is_gzip(path) else path.open("rb")


def _unpacked(disk: IO[bytes], path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.GzipFile(fileobj=disk, mode="rb") if is_gzip(path) else disk


def read_head(path: Path, lines: int) -> list[bytes]:
    """Return the first lines of a file, without their ends."""
    with gzip_errors(path), open_text(path) as file:
        head = [file.readline(_LONGEST_LINE) for _ in range(lines)]
    return [line.rstrip(b"\r\n") for line in head if line]


class TextTable(RawTable):
    """Rows that are lines. Subclasses say how to parse a block of them."""

    def __init__(
        self,
        files: Sequence[RawFile],
        layout: Layout,
        *,
        header_lines: int = 0,
    ) -> None:
        self.files = list(files)
        self.layout = layout
        self.header_lines = header_lines
        self.block_bytes = BLOCK_BYTES
        self._stream: IO[bytes] | gzip.GzipFile | None = None
        self._at = (-1, 0)

    @abstractmethod
    def parse(self, data: bytes, rows: int) -> Parsed:
        """Turn a block of lines into columns of the common shape (see `importers.base`)."""

    def index(self, file: int, row: int, advance: Callable[[int], None]) -> FileIndex:
        path = self.files[file].path
        size = path.stat().st_size
        if size == 0:
            raise DataError(f"{path} is empty; expected rows of {', '.join(self.layout.names[:4])}")
        blocks: list[Block] = []
        with gzip_errors(path), path.open("rb") as disk, _unpacked(disk, path) as stream:
            head = [stream.readline(_LONGEST_LINE) for _ in range(self.header_lines)]
            start = sum(map(len, head))
            line = 1 + self.header_lines
            for length, count in self._cuts(stream, disk, path, advance):
                block = Block(
                    file=file, start=start, end=start + length, line=line, row=row, rows=count
                )
                blocks.append(block)
                start, line, row = start + length, line + count, row + count
        if not blocks:
            raise DataError(f"{path} has a header but no rows")
        return FileIndex(blocks=blocks, bytes=size, sha256=file_sha256(path), text_bytes=start)

    def _cuts(
        self,
        stream: IO[bytes] | gzip.GzipFile,
        disk: IO[bytes],
        path: Path,
        advance: Callable[[int], None],
    ) -> Iterator[tuple[int, int]]:
        """Yield (bytes, lines) of successive blocks; each ends with its last whole line."""
        carry = b""
        told = 0
        while True:
            data = stream.read(self.block_bytes - len(carry))
            advance(disk.tell() - told)
            told = disk.tell()
            block = carry + data
            if not block:
                return
            cut = block.rfind(b"\n") + 1
            if len(block) < self.block_bytes and not data:
                # The end of the file: a last line may lack its newline.
                yield len(block), block.count(b"\n") + (cut < len(block))
                return
            if cut == 0:
                more = stream.readline(_LONGEST_LINE)
                block += more
                if not more.endswith(b"\n") and len(more) >= _LONGEST_LINE:
                    raise DataError(
                        f"{path} has a line longer than {_LONGEST_LINE} bytes; it is not a text "
                        f"table with a row per line"
                    )
                yield len(block), 1
                carry = b""
                continue
            yield cut, block.count(b"\n", 0, cut)
            carry = block[cut:]

    def read(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Rows]]:
        for block in blocks:
            data = self._bytes(block)
            parsed = self.parse(data, block.rows)
            lines: list[bytes] = []

            def raw(offset: int, data: bytes = data, lines: list[bytes] = lines) -> bytes:
                if not lines:
                    lines.extend(split_lines(data))
                return lines[offset]

            bad = [self.bad_row(block, at, why, raw(at)) for at, why in parsed.bad]
            yield block, self.finish(parsed.frame, parsed.positions, bad, block, raw)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _bytes(self, block: Block) -> bytes:
        path = self.files[block.file].path
        with gzip_errors(path):
            if self._stream is None or self._at[0] != block.file or self._at[1] > block.start:
                self.close()
                self._stream = open_text(path)
                self._at = (block.file, 0)
            if self._at[1] != block.start:
                self._stream.seek(block.start)
            data = self._stream.read(block.end - block.start)
        self._at = (block.file, block.end)
        if len(data) != block.end - block.start:
            raise DataError(f"{path} became shorter while it was read; start again")
        return data


class Parsed:
    """A parsed block: its columns, its rows' offsets (None: all of them), and (offset, reason)
    of the rows left out."""

    __slots__ = ("bad", "frame", "positions")

    def __init__(
        self,
        frame: pl.DataFrame,
        positions: np.ndarray | None = None,
        bad: Sequence[tuple[int, str]] = (),
    ) -> None:
        self.frame = frame
        self.positions = positions
        self.bad = list(bad)


def split_lines(data: bytes) -> list[bytes]:
    """Split at newlines; a newline at the very end opens no further line."""
    lines = data.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    return [line.removesuffix(b"\r") for line in lines]


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ):
            digest.update(chunk)
    return digest.hexdigest()


__all__ = ["BLOCK_BYTES", "BadRow", "Parsed", "TextTable", "is_gzip", "open_text", "read_head"]
