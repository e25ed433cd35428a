"""The dataset as candidates see it: the training split, and some rows of the validation split.

The test split is not in it, so no candidate's score can depend on test data.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embcomp.data_pipelines.integrity import record_of
from embcomp.data_pipelines.sample_weights import sum_of
from embcomp.data_pipelines.schema import FILE_NAME, DatasetInfo, SplitInfo
from embcomp.errors import DataError
from embcomp.io.atomic_files import atomic_path
from embcomp.io.reproducible_sums import to_digits

_VALID_FILE = "valid.parquet"
_SOURCE = "source"  # a link to the prepared dataset, so that the view's paths stay inside it
_ROW_GROUP = 65_536


def write_view(source: str | Path, folder: Path, valid_rows: int | None) -> Path:
    """Write the view's `dataset.json`, whose files are the source's own; returns its folder.

    Args:
        source: the prepared dataset.
        folder: for the view; an equal one is left as it is.
        valid_rows: rows of the validation split, spread evenly over it; None takes all, in place.
    """
    info = DatasetInfo.load(source)
    for split in ("train", "valid"):
        if split not in info.splits or not info.split(split).rows:
            raise DataError(
                f"{source} has no rows in a split {split!r}; candidates are trained on train and "
                "scored on valid"
            )
    folder.mkdir(parents=True, exist_ok=True)
    _link(folder / _SOURCE, Path(source).resolve())
    view = info.model_copy(deep=True)
    view.splits = {"train": _in_place(info.split("train")), "valid": _in_place(info.split("valid"))}
    view.bayes = None
    for feature in view.categorical:
        if feature.vocabulary:
            feature.vocabulary = f"{_SOURCE}/{feature.vocabulary}"
    view.checksums = {f"{_SOURCE}/{file}": each for file, each in info.checksums.items()}
    if valid_rows is not None and valid_rows < info.split("valid").rows:
        view.splits["valid"] = sample = _sample(info, valid_rows, folder / _VALID_FILE)
        view.checksums[_VALID_FILE] = record_of(folder / _VALID_FILE, sample.positives)
    if not _says(folder, view):
        view.save(folder)
    return folder


def _link(link: Path, home: Path) -> None:
    if not (link.is_symlink() and link.readlink() == home):
        temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex}")
        temporary.symlink_to(home, target_is_directory=True)
        temporary.replace(link)


def _says(folder: Path, view: DatasetInfo) -> bool:
    """Whether a view is there already and says the same."""
    if not (folder / FILE_NAME).exists():
        return False
    try:
        there = DatasetInfo.load(folder)
    except DataError:  # of an older version, or damaged
        return False
    left_out = {"digest", "checksums", "sources"}
    same = there.model_dump(exclude=left_out) == view.model_dump(exclude=left_out)
    return same and all(there.checksums.get(f) == view.checksums.get(f) for f in view.files())


def _in_place(split: SplitInfo) -> SplitInfo:
    return split.model_copy(update={"files": [f"{_SOURCE}/{file}" for file in split.files]})


def _sample(info: DatasetInfo, rows: int, path: Path) -> SplitInfo:
    """Every n-th row of the validation split, as one file."""
    split = info.split("valid")
    wanted = np.arange(rows, dtype=np.int64) * split.rows // rows
    if not path.exists() or pq.read_metadata(path).num_rows != rows:
        parts, first = [], 0
        for file in split.files:
            parquet = pq.ParquetFile(info.folder / file, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).num_rows
                low, high = np.searchsorted(wanted, [first, first + size])
                if high > low:
                    table = parquet.read_row_group(group)
                    parts.append(table.take(pa.array(wanted[low:high] - first)))
                first += size
        rows_of_view = pa.concat_tables(parts)
        with atomic_path(path) as temporary:
            pq.write_table(
                rows_of_view, temporary, row_group_size=_ROW_GROUP, write_page_checksum=True
            )
    sample = pq.read_table(path, columns=info.column_names[: 1 if info.weight is None else 2])
    positives = int(np.asarray(sample[info.label]).sum())
    changes = {"files": [path.name], "rows": rows, "positives": positives}
    if info.weight is not None:
        changes["weight"] = to_digits(sum_of(np.asarray(sample[info.weight])))
    return split.model_copy(update=changes)
