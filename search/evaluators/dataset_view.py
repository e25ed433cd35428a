"""The dataset as candidates see it: the training split, and some rows of the validation split.

The test split is not in it, so no candidate's score can depend on test data.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embcomp.data_pipelines.schema import FILE_NAME, DatasetInfo, SplitInfo
from embcomp.errors import DataError

_VALID_FILE = "valid.parquet"
_ROW_GROUP = 65_536


def write_view(source: str | Path, folder: Path, valid_rows: int | None) -> Path:
    """Writes the view's `dataset.json`, whose files are the source's own; returns its folder.

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
    home = Path(source).resolve()
    view = info.model_copy(deep=True)
    view.splits = {
        "train": _in_place(info.split("train"), home),
        "valid": _in_place(info.split("valid"), home),
    }
    view.bayes = None
    for feature in view.categorical:
        if feature.vocabulary:
            feature.vocabulary = str(home / feature.vocabulary)
    if valid_rows is not None and valid_rows < info.split("valid").rows:
        view.splits["valid"] = _sample(info, valid_rows, folder / _VALID_FILE)
    text = folder / FILE_NAME
    if not text.exists() or DatasetInfo.load(folder).model_dump() != view.model_dump():
        view.save(folder)
    return folder


def _in_place(split: SplitInfo, home: Path) -> SplitInfo:
    return split.model_copy(update={"files": [str(home / file) for file in split.files]})


def _sample(info: DatasetInfo, rows: int, path: Path) -> SplitInfo:
    """Every n-th row of the validation split, as one file."""
    split = info.split("valid")
    wanted = np.arange(rows, dtype=np.int64) * split.rows // rows
    if not path.exists() or pq.read_metadata(path).num_rows != rows:
        parts, first = [], 0
        for file in split.files:
            parquet = pq.ParquetFile(info.folder / file)
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).num_rows
                low, high = np.searchsorted(wanted, [first, first + size])
                if high > low:
                    table = parquet.read_row_group(group)
                    parts.append(table.take(pa.array(wanted[low:high] - first)))
                first += size
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        pq.write_table(pa.concat_tables(parts), temporary, row_group_size=_ROW_GROUP)
        Path(temporary).replace(path)
    labels = pq.read_table(path, columns=[info.label])[info.label]
    positives = int(np.asarray(labels).sum())
    return split.model_copy(update={"files": [path.name], "rows": rows, "positives": positives})
