"""Files that say which rows the ids of a table read: one line for each id, one column for each row.

`.npy` holds an integer array (N,) or (N, columns), whose line n is that of id n. Parquet holds integer
columns in their order; one that is called `id` says whose line it is, else they come in the order of
ids. -1 stands for no row. A Parquet file may say for which vocabulary it was made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embcomp.errors import DataError, one_line
from embcomp.io.atomic_files import atomic_path
from embcomp.io.digests import sha256_of_file

MOST_COLUMNS = 1024
NO_ROW = -1
_ID = "id"
_NOTE = b"embcomp row map"
_MOST_ROWS = 2**31 - 1
_AT_ONCE = 1 << 20  # lines that are looked at together
_UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError, EOFError)


@dataclass(frozen=True, kw_only=True)
class RowMapSummary:
    """What a file holds.

    Attributes:
        num_ids: lines.
        rows: for each column, how many rows it names: one more than the largest.
        skips: whether an id has no row under some column.
        sha256: of the file.
        vocabulary: SHA-256 of the vocabulary that it was made for; empty where it does not say.
    """

    num_ids: int
    rows: tuple[int, ...]
    skips: bool
    sha256: str
    vocabulary: str = ""


def summarise_row_map(path: str | Path) -> RowMapSummary:
    """Read and check a file once; later calls answer from memory while the file is the same.

    Raises:
        DataError: for a file that is not there, cannot be read, or is no map.
    """
    try:
        now = Path(path).stat()
    except (OSError, ValueError) as error:
        raise DataError(f"row map {str(path)!r} cannot be read: {one_line(error)}") from None
    return _summarised(str(Path(path).absolute()), now.st_mtime_ns, now.st_size)


@lru_cache(maxsize=256)
def _summarised(path: str, changed: int, size: int) -> RowMapSummary:
    lines, vocabulary = _read(Path(path))
    largest = np.full(lines.shape[1], NO_ROW, dtype=np.int64)
    skips = False
    for part in _parts(lines):
        if part.min() < NO_ROW or part.max() >= _MOST_ROWS:
            worst = int(part.min()) if part.min() < NO_ROW else int(part.max())
            raise DataError(
                f"row map {path}: expected rows from 0 to {_MOST_ROWS - 1}, or -1 for none; got {worst}"
            )
        largest = np.maximum(largest, part.max(axis=0))
        skips = skips or bool((part == NO_ROW).any())
    if (largest < 0).any():
        column = int((largest < 0).argmax())
        raise DataError(f"row map {path}: column {column} names no row at all; leave it out")
    return RowMapSummary(
        num_ids=len(lines),
        rows=tuple(int(row) + 1 for row in largest),
        skips=skips,
        sha256=sha256_of_file(Path(path)),
        vocabulary=vocabulary,
    )


def read_row_map(path: str | Path) -> NDArray[np.integer]:
    """The rows of every id: (N, columns) integers, which may lie in the file.

    Raises:
        DataError: as for `summarise_row_map`.
    """
    summarise_row_map(path)
    return _read(Path(path))[0]


def write_row_map(path: str | Path, rows: NDArray[np.integer], *, vocabulary: str = "") -> None:
    """Write a map as Parquet, or as `.npy` where the path ends so.

    Args:
        path: in a folder that is there.
        rows: (N,) or (N, columns) integers.
        vocabulary: SHA-256 of the vocabulary that it is for, which Parquet remembers.
    """
    lines, target = _as_lines(rows, str(path)), Path(path)
    if _kind(target) == "npy" and vocabulary:
        raise DataError(f"row map {path}: .npy has no place for a vocabulary; write .parquet")
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        if _kind(target) == "npy":
            np.save(file, lines)
            return
        columns = {f"row_{n}": pa.array(column) for n, column in enumerate(lines.T)}
        note = {_NOTE: json.dumps({"vocabulary": vocabulary}).encode()}
        pq.write_table(pa.table(columns).replace_schema_metadata(note), file)


def _parts(lines: NDArray[np.integer]) -> Iterator[NDArray[np.integer]]:
    for start in range(0, len(lines), _AT_ONCE):
        yield lines[start : start + _AT_ONCE]


def _kind(path: Path) -> str:
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("npy", "parquet"):
        raise DataError(f"row map {path}: expected a file that ends with .npy or .parquet")
    return kind


def _read(path: Path) -> tuple[NDArray[np.integer], str]:
    """The lines in the order of ids, and the vocabulary that they are for."""
    kind = _kind(path)
    try:
        if kind == "npy":
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            return _as_lines(found, str(path)), ""
        return _read_parquet(path)
    except DataError:
        raise
    except _UNREADABLE as error:
        raise DataError(f"row map {path} cannot be read: {one_line(error)}") from None


def _as_lines(rows: NDArray[np.integer], path: str) -> NDArray[np.integer]:
    """(N, columns) of what a file or a caller has."""
    lines = rows[:, None] if rows.ndim == 1 else rows
    if lines.ndim != 2 or not np.issubdtype(lines.dtype, np.integer):
        raise DataError(
            f"row map {path}: expected integers of the shape (ids,) or (ids, columns); got "
            f"{lines.dtype} {rows.shape}"
        )
    if lines.dtype == np.uint64:
        raise DataError(f"row map {path}: expected integers that may be negative; got uint64")
    if not len(lines) or not 1 <= lines.shape[1] <= MOST_COLUMNS:
        raise DataError(
            f"row map {path}: expected at least one id and 1 to {MOST_COLUMNS} columns; got {rows.shape}"
        )
    return lines


def _read_parquet(path: Path) -> tuple[NDArray[np.integer], str]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
        names = [name for name in schema.names if name != _ID]
        for name in schema.names:
            if not pa.types.is_integer(schema.field(name).type):
                raise DataError(
                    f"row map {path}: expected integer columns; {name!r} is {schema.field(name).type}"
                )
        lines = np.empty((count, len(names)), dtype=np.int64)
        _as_lines(lines, str(path))
        ids = np.arange(count) if _ID not in schema.names else np.empty(count, dtype=np.int64)
        start = 0
        for batch in file.iter_batches(batch_size=_AT_ONCE):
            part = slice(start, start + len(batch))
            for name in schema.names:
                if batch[name].null_count:
                    raise DataError(
                        f"row map {path}: column {name!r} has nulls; -1 stands for no row"
                    )
                values = batch[name].to_numpy()
                if name == _ID:
                    ids[part] = values
                else:
                    lines[part, names.index(name)] = values
            start += len(batch)
        note = json.loads((schema.metadata or {}).get(_NOTE, b"{}"))
    if _ID in schema.names:
        lines = _by_id(lines, ids, path)
    return lines, str(note.get("vocabulary", "")) if isinstance(note, dict) else ""


def _by_id(lines: NDArray[np.integer], ids: NDArray[np.int64], path: Path) -> NDArray[np.integer]:
    """The lines in the order of their ids, each of which is there once."""
    seen = np.zeros(len(ids), dtype=np.int64)
    outside = (ids < 0) | (ids >= len(ids))
    if not outside.any():
        seen = np.bincount(ids, minlength=len(ids))
    if outside.any() or (seen != 1).any():
        what = (
            f"id {int(ids[outside.argmax()])} is outside [0, {len(ids)})"
            if outside.any()
            else f"id {int((seen != 1).argmax())} is there {int(seen[(seen != 1).argmax()])} times"
        )
        raise DataError(f"row map {path}: expected each id of {len(ids)} lines once; {what}")
    ordered = np.empty_like(lines)
    ordered[ids] = lines
    return ordered
