"""Parquet files as blocks of rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import override

from embcomp.data_pipelines.importers.base import Block, FileIndex, Layout, RawFile, RawTable, Rows
from embcomp.data_pipelines.importers.compressed import reading
from embcomp.data_pipelines.importers.text import file_sha256
from embcomp.errors import DataError, one_line
from embcomp.io.remote_paths import RemotePath, arrow_input

BLOCK_ROWS = 65_536


class ParquetTable(RawTable):
    """Rows of Parquet files; a block never spans two row groups."""

    columns: list[str]

    def __init__(self, files: Sequence[RawFile], layout: Layout) -> None:
        self.files = list(files)
        self.layout = layout
        self.block_rows = BLOCK_ROWS
        self._next: tuple[int, int] | None = None
        self._batches: Iterator[pa.Table] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_next": None, "_batches": None}

    @abstractmethod
    def shape(self, frame: pl.DataFrame, file: int) -> pl.DataFrame:
        """Bring raw columns of one of `files` into the common shape (see `importers.base`)."""

    def names(self, file: RawFile) -> list[str]:
        """Return the names of all columns of a file."""
        with _damage(file.path, "in its schema"):
            names = list(_open(file.path).schema_arrow.names)
        double = sorted({name for name in self.columns if names.count(name) > 1})
        if double:
            raise DataError(f"{file.path}: columns named twice: {double}")
        return names

    def types(self, file: RawFile) -> dict[str, pl.DataType]:
        """Return the polars type of each column of a file that is wanted."""
        with _damage(file.path, "in its schema"):
            schema = _open(file.path).schema_arrow
            fields = [field for field in schema if field.name in self.columns]
        for field in fields:
            # Polars has no such type, and ends the process over it.
            if pa.types.is_decimal256(field.type):
                raise DataError(
                    f"{file.path}: column {field.name!r} holds {field.type}; write it with at most "
                    f"38 digits (decimal128) or as text"
                )
        with _damage(file.path, "in its schema"):
            empty = pl.from_arrow(pa.schema(fields).empty_table())
        assert isinstance(empty, pl.DataFrame)
        return dict(empty.schema)

    @override
    def index(self, file: int, row: int, advance: Callable[[int], None]) -> FileIndex:
        path = self.files[file].path
        metadata = _open(path).metadata
        blocks: list[Block] = []
        at = 0
        size = 0
        for group in range(metadata.num_row_groups):
            here = metadata.row_group(group)
            size += here.total_byte_size
            for start in range(0, here.num_rows, self.block_rows):
                count = min(self.block_rows, here.num_rows - start)
                blocks.append(
                    Block(
                        file=file,
                        start=at + start,
                        end=at + start + count,
                        line=at + start + 1,
                        row=row + at + start,
                        rows=count,
                    )
                )
            at += here.num_rows
        on_disk = path.stat().st_size
        advance(on_disk)
        sha256 = "" if self.to_score else file_sha256(path)
        return FileIndex(blocks=blocks, bytes=on_disk, sha256=sha256, text_bytes=size)

    @property
    @override
    def starts_anywhere(self) -> bool:
        return not any(isinstance(file.path, RemotePath) for file in self.files)

    @override
    def read(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Rows]]:
        for block in blocks:
            raw = self._block(block)

            def text(offset: int, raw: pl.DataFrame = raw) -> bytes:
                return repr(raw.row(offset, named=True)).encode()

            yield block, self.finish(self.shape(raw, block.file), None, [], block, text)

    def _block(self, block: Block) -> pl.DataFrame:
        path = self.files[block.file].path
        with _damage(path, f"at row {block.line}"):
            if self._next != (block.file, block.start):
                self._seek(path, block)
            batch = next(self._batches or iter(()), None)
            if batch is None:
                raise DataError(f"{path} ends before row {block.line}, which its footer promises")
            # Polars takes texts and offsets at their word, and panics at metadata that are not UTF-8.
            batch.validate(full=True)
            frame = pl.from_arrow(batch.replace_schema_metadata(None))
        self._next = (block.file, block.end)
        assert isinstance(frame, pl.DataFrame)
        if frame.height != block.rows:
            raise DataError(f"{path} changed while it was read; start again")
        return frame

    def _seek(self, path: Path, block: Block) -> None:
        source = _open(path)
        first = 0
        group = 0
        while first + source.metadata.row_group(group).num_rows <= block.start:
            first += source.metadata.row_group(group).num_rows
            group += 1
        # One iterator per row group, as a batch would otherwise run on into the next one.
        self._batches = (
            batch
            for g in range(group, source.metadata.num_row_groups)
            for batch in _of_size(
                source.iter_batches(self.block_rows, row_groups=[g], columns=self.columns),
                self.block_rows,
            )
        )
        for _ in range((block.start - first) // self.block_rows):
            next(self._batches, None)


def _of_size(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Yield tables of so many rows, and what is left: batches with dictionaries may be ragged."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        while sum(piece.num_rows for piece in held) >= rows:
            whole = pa.Table.from_batches(held)
            yield whole.slice(0, rows)
            held = whole.slice(rows).to_batches()
    if any(piece.num_rows for piece in held):
        yield pa.Table.from_batches(held)


@contextmanager
def _damage(path: Path, place: str) -> Iterator[None]:
    """Name the file and the place when its bytes are not what its format allows."""
    try:
        yield
    except (
        pa.ArrowException,
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged {place}: {one_line(error)}") from None


def _open(path: Path) -> pq.ParquetFile:
    try:
        with reading(path):
            return pq.ParquetFile(arrow_input(path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a Parquet file, or a truncated one: {one_line(error)}"
        ) from None
