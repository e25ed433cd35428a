"""Text files, plain or compressed, as blocks of whole lines."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray
from typing_extensions import override

from embcomp.data_pipelines.importers.base import Block, FileIndex, Layout, RawFile, RawTable, Rows
from embcomp.data_pipelines.importers.compressed import compression, reading, unpacked, unpacking
from embcomp.errors import DataError
from embcomp.io.digests import HashedReading
from embcomp.io.remote_paths import RemotePath

BLOCK_BYTES = 4 << 20
_READ = 1 << 20
_LONGEST_LINE = 64 << 20
_BOM = "\ufeff".encode()


class LineError(Exception):
    """What is wrong with a whole file, found at a line of a block: its offset, and the reason."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset
        self.reason = reason


def read_head(path: Path, lines: int) -> list[bytes]:
    """Return the first lines of a file, without their ends."""
    kind = compression(path)
    with unpacking(path, kind), path.open("rb") as disk, unpacked(disk, kind) as file:
        head = [file.readline(_LONGEST_LINE) for _ in range(lines)]
    return split_lines(b"".join(head).removeprefix(_BOM))


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
        self._kind: str | None = None
        self._disk: IO[bytes] | None = None
        self._stream: IO[bytes] | None = None
        self._at = (-1, 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kind": None, "_disk": None, "_stream": None, "_at": (-1, 0)}

    @abstractmethod
    def parse(self, data: bytes, rows: int, file: int) -> Parsed:
        """Turn a block of lines of one of `files` into columns of the common shape (see `importers.base`).

        Raises:
            LineError: the whole file cannot be read, as a line shows.
        """

    @override
    def index(self, file: int, row: int, advance: Callable[[int], None]) -> FileIndex:
        path = self.files[file].path
        size = path.stat().st_size
        if size == 0:
            raise DataError(f"{path} is empty; expected rows of {', '.join(self.layout.names[:4])}")
        blocks: list[Block] = []
        kind = compression(path)
        with unpacking(path, kind), path.open("rb") as disk:
            hashed = None if self.to_score else HashedReading(disk)
            read = disk if hashed is None else cast(IO[bytes], hashed)
            with unpacked(read, kind) as stream:
                head = [stream.readline(_LONGEST_LINE) for _ in range(self.header_lines)]
                start = sum(map(len, head))
                line = 1 + self.header_lines
                for length, count in self._cuts(stream, read, path, advance):
                    block = Block(
                        file=file, start=start, end=start + length, line=line, row=row, rows=count
                    )
                    blocks.append(block)
                    start, line, row = start + length, line + count, row + count
                    if self.row_limit is not None and row >= self.row_limit:
                        break
                sha256 = "" if hashed is None else hashed.sha256()
        if not blocks:
            raise DataError(f"{path} has a header but no rows")
        return FileIndex(blocks=blocks, bytes=size, sha256=sha256, text_bytes=start)

    def _cuts(
        self,
        stream: IO[bytes],
        disk: IO[bytes],
        path: Path,
        advance: Callable[[int], None],
    ) -> Iterator[tuple[int, int]]:
        """Yield (bytes, lines) of successive blocks; each ends with its last whole line."""
        block, held, told = bytearray(self.block_bytes), 0, 0
        newlines = np.empty(self.block_bytes, dtype=bool)
        while True:
            come = _fill(stream, memoryview(block)[held:])
            advance(disk.tell() - told)
            told = disk.tell()
            size = held + come
            if not size:
                return
            cut = block.rfind(b"\n", 0, size) + 1
            count = _count_lines(block, cut, newlines)
            if size < self.block_bytes and not come:
                # The end of the file: a last line may lack its newline.
                yield size, count + (cut < size)
                return
            if cut == 0:
                more = stream.readline(_LONGEST_LINE)
                if not more.endswith(b"\n") and len(more) >= _LONGEST_LINE:
                    raise DataError(
                        f"{path} has a line longer than {_LONGEST_LINE} bytes; it is not a text "
                        f"table with a row per line"
                    )
                yield size + len(more), 1
                held = 0
                continue
            yield cut, count
            held = size - cut
            block[:held] = block[cut:size]

    @property
    @override
    def starts_anywhere(self) -> bool:
        # A file behind a URL may be one open object for all who open it.
        paths = [file.path for file in self.files]
        return not any(isinstance(p, RemotePath) or compression(p) is not None for p in paths)

    @override
    def read(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Rows]]:
        for block in blocks:
            data = self._bytes(block)
            try:
                parsed = self.parse(data, block.rows, block.file)
            except LineError as error:
                place = f"{self.files[block.file].path}, line {block.line + error.offset}"
                raise DataError(f"{place}: {error.reason}") from None
            lines: list[bytes] = []

            def raw(offset: int, data: bytes = data, lines: list[bytes] = lines) -> bytes:
                if not lines:
                    lines.extend(split_lines(data))
                return lines[offset]

            bad = [self.bad_row(block, at, why, raw(at)) for at, why in parsed.bad]
            yield block, self.finish(parsed.frame, parsed.positions, bad, block, raw)

    @override
    def close(self) -> None:
        for opened in (self._stream, self._disk):
            if opened is not None:
                opened.close()
        self._stream = self._disk = None

    def _bytes(self, block: Block) -> bytes:
        path = self.files[block.file].path
        kind = compression(path) if self._at[0] != block.file else self._kind
        with unpacking(path, kind):
            if self._stream is None or self._at[0] != block.file or self._at[1] > block.start:
                self.close()
                self._kind = kind
                self._disk = path.open("rb")
                self._stream = unpacked(self._disk, kind)
                self._at = (block.file, 0)
            _skip(self._stream, block.start - self._at[1])
            data = self._stream.read(block.end - block.start)
        self._at = (block.file, block.end)
        if len(data) != block.end - block.start:
            raise DataError(f"{path} became shorter while it was read; start again")
        # A mark at the start of a file belongs to no value.
        return data.removeprefix(_BOM) if block.start == 0 else data


def _fill(stream: IO[bytes], room: memoryview) -> int:
    """Read until there is no room or nothing more; return how many bytes came."""
    filled = 0
    while filled < len(room) and (come := stream.readinto(room[filled:])):  # type: ignore[attr-defined]
        filled += come
    return filled


def _count_lines(block: bytearray, size: int, newlines: NDArray[np.bool_]) -> int:
    """Count the newlines of the first bytes of a block, with room to note where they are."""
    bytes_ = np.frombuffer(block, dtype=np.uint8, count=size)
    return int(np.count_nonzero(np.equal(bytes_, 10, out=newlines[:size])))


def _skip(stream: IO[bytes], count: int) -> None:
    if stream.seekable():
        stream.seek(count, os.SEEK_CUR)
        return
    while count > 0 and (data := stream.read(min(count, _READ))):
        count -= len(data)


class Parsed:
    """A parsed block.

    Its columns, its rows' offsets (None: all of them), and (offset, reason) of the rows left out.
    """

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
    with reading(path), path.open("rb") as file:
        while chunk := file.read(_READ):
            digest.update(chunk)
    return digest.hexdigest()
