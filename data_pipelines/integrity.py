"""Whether a dataset's files are as they were written: what is quick to see, and every byte.

Sizes, footers, vocabulary sizes and the description itself are compared whenever a dataset is opened
to work on it. Labels take a read of one column, digests a read of everything; both can be shared
out over ranks. Datasets without checksums, which older versions prepared, are compared as far as
their description goes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embcomp.data_pipelines.schema import (
    FILE_NAME,
    FIRST_ID,
    DatasetInfo,
    FileRecord,
)
from embcomp.errors import DataError, one_line
from embcomp.io.digests import footer_sha256, sha256_of_file
from embcomp.io.remote_paths import arrow_input

UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError)
"""What pyarrow raises on damaged files."""
_WAY_OUT = "the file is damaged or another one: copy it or prepare the dataset again"


def open_dataset(folder: str | Path) -> DatasetInfo:
    """Load a description and compare with it what is quick to compare.

    Raises:
        DataError: the dataset cannot be read, or is not as it was written.
    """
    info = DatasetInfo.load(folder)
    check_quickly(info)
    return info


def has_checksums(info: DatasetInfo) -> bool:
    """Whether every file, and the description, can be compared with what was written."""
    return bool(info.digest) and all(file in info.checksums for file in info.files())


def without_checksums(info: DatasetInfo) -> str:
    """The sentence about a dataset that an older version prepared."""
    return (
        f"{info.folder} records no checksums, as it was prepared before there were any: changed "
        f"values in it cannot be told; prepare it again to have them"
    )


def record_of(path: Path, positives: int | None = None) -> FileRecord:
    """Describe a file that was not written by a `RowGroupWriter`, which knows its digest."""
    return FileRecord(
        bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        footer_sha256=footer_sha256(path),
        rows=pq.read_metadata(arrow_input(path)).num_rows,
        positives=positives,
    )


def check_quickly(info: DatasetInfo) -> None:
    """Compare the description with its digest, and files with their sizes and footers."""
    info.check_digest()
    for file, record in _records(info).items():
        path = info.folder / file
        size = path.stat().st_size
        if size != record.bytes:
            raise DataError(f"{path} has {size} bytes, {FILE_NAME} says {record.bytes}; {_WAY_OUT}")
        if footer_sha256(path) != record.footer_sha256:
            raise DataError(f"{path} has another footer than when it was written; {_WAY_OUT}")
    _check_counts(info)
    check_vocabularies(info)


def _records(info: DatasetInfo) -> dict[str, FileRecord]:
    return {file: info.checksums[file] for file in info.files() if file in info.checksums}


def _check_counts(info: DatasetInfo) -> None:
    """Compare the counts of each split with the sums over its files."""
    for name, split in info.splits.items():
        records = [info.checksums[file] for file in split.files if file in info.checksums]
        if len(records) < len(split.files):
            continue
        for what, stated, summed in (
            ("rows", split.rows, sum(each.rows for each in records)),
            ("positives", split.positives, sum(each.positives or 0 for each in records)),
        ):
            # A description without rows, as artefacts have one, keeps the counts.
            if split.files and stated != summed:
                raise DataError(
                    f"{info.folder}: split {name} states {stated} {what}, its files {summed}; "
                    f"prepare the dataset again"
                )


def check_vocabularies(info: DatasetInfo) -> None:
    """Compare each feature's `num_embeddings` with the size of its vocabulary."""
    for feature in info.categorical:
        if not feature.vocabulary:
            continue
        path = info.folder / feature.vocabulary
        try:
            values = pq.read_metadata(arrow_input(path)).num_rows
        except UNREADABLE as error:
            raise DataError(f"{path} cannot be read: {one_line(error)}") from None
        if values != feature.num_values:
            raise DataError(
                f"{path} has {values} values, but {feature.name} has {feature.num_embeddings} "
                f"embeddings, {FIRST_ID + (feature.room or 0)} of them without a value; the two do not belong together: "
                f"prepare the dataset again"
            )


def check_labels(
    info: DatasetInfo, splits: Collection[str], *, rank: int = 0, world_size: int = 1
) -> None:
    """Count the labels of some splits and compare them with the description.

    Args:
        rank: which share of the files to read, out of `world_size`; where files have no checksums,
            their counts are known by split only, and the first rank reads all.
    """
    for name in splits:
        split = info.split(name)
        known = all(file in info.checksums for file in split.files)
        counted = 0
        for place, file in enumerate(split.files):
            if place % world_size != rank if known else rank:
                continue
            found = _positives(info, info.folder / file)
            counted += found
            if known and found != info.checksums[file].positives:
                raise DataError(
                    f"{info.folder / file} has {found} labels that are 1, {FILE_NAME} says "
                    f"{info.checksums[file].positives}; {_WAY_OUT}"
                )
        if not known and not rank and counted != split.positives:
            raise DataError(
                f"{info.folder}: split {name} states {split.positives} positives, its files hold "
                f"{counted}; prepare the dataset again"
            )


def _positives(info: DatasetInfo, path: Path) -> int:
    positives = 0
    try:
        with pq.ParquetFile(arrow_input(path), page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                # One column of a row group: a thread each would cost more than it saves.
                table = file.read_row_group(group, columns=[info.label], use_threads=False)
                positives += int(np.count_nonzero(table.column(info.label).to_numpy() == 1))
    except (KeyError, *UNREADABLE) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    return positives


def damaged_files(
    info: DatasetInfo,
    *,
    rank: int = 0,
    world_size: int = 1,
    advance: Callable[[int], None] = lambda size: None,
) -> list[str]:
    """Read every file that has a checksum; return those whose bytes are not what was written.

    Args:
        rank: which share of the files to read, out of `world_size`.
        advance: called with the bytes of each file that was read.
    """
    damaged = []
    for file, record in list(_records(info).items())[rank::world_size]:
        if sha256_of_file(info.folder / file) != record.sha256:
            damaged.append(file)
        advance(record.bytes)
    return damaged


def check_digests(
    info: DatasetInfo,
    *,
    rank: int = 0,
    world_size: int = 1,
    advance: Callable[[int], None] = lambda size: None,
) -> None:
    """Raise a DataError that names the files whose bytes are not what was written."""
    damaged = damaged_files(info, rank=rank, world_size=world_size, advance=advance)
    if damaged:
        raise DataError(damage(info, damaged))


def damage(info: DatasetInfo, files: list[str]) -> str:
    """The sentence about files whose digests differ."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{info.folder / files[0]}{more}: the SHA-256 is not that in {FILE_NAME}; {_WAY_OUT}"
