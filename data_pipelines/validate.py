"""Check that a dataset folder is whole and agrees with its `dataset.json`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embcomp.data_pipelines.integrity import UNREADABLE, check_quickly, damage, damaged_files
from embcomp.data_pipelines.sample_weights import are_equal, sum_of
from embcomp.data_pipelines.schema import FILE_NAME, FIRST_ID, CategoricalFeature, DatasetInfo
from embcomp.errors import DataError, one_line
from embcomp.io.remote_paths import arrow_input


def validate_dataset(folder: str | Path) -> DatasetInfo:
    """Read every row of a dataset and check it.

    Checked are: the files are there and readable, the columns and types, the row and label counts,
    ids within `num_embeddings`, numbers finite, vocabularies by rank and of the stated size; and,
    where the dataset has checksums, every byte.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    info = DatasetInfo.load(folder)
    damaged = damaged_files(info)
    try:
        _check_contents(info)
    except DataError:
        raise  # says more than a digest does
    except Exception:
        if not damaged:
            raise
    if damaged:
        raise DataError(damage(info, damaged))
    check_quickly(info)
    _check_layout(info)
    return info


def _check_layout(info: DatasetInfo) -> None:
    """Find what was changed in the text of a description without changing what it says."""
    path = info.folder / FILE_NAME
    text = path.read_text(encoding="utf-8")
    if info.digest and text != json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n":
        raise DataError(
            f"{path} says what it said when it was written, but not in the same bytes; copy it or "
            f"prepare the dataset again"
        )


def _check_contents(info: DatasetInfo) -> None:
    for feature in info.categorical:
        _check_vocabulary(info.folder, feature)
    for name, split in info.splits.items():
        rows = 0
        positives = weight = 0.0
        for file in split.files:
            found, positive, weighs = _check_file(info, info.folder / file)
            rows += found
            positives += positive
            weight += weighs
        if info.weight is not None and not are_equal(split.weight, weight):
            raise DataError(
                f"{info.folder}: the weights of split {name} are stated to sum to {split.weight}, "
                f"those of its files sum to {weight:.12g}; prepare the dataset again"
            )
        for what, stated, counted in (
            ("rows", split.rows, rows),
            ("positives", split.positives, positives),
        ):
            if stated != counted:
                raise DataError(
                    f"{info.folder}: split {name} states {stated} {what}, its files hold "
                    f"{counted:g}; prepare the dataset again"
                )


def _check_file(info: DatasetInfo, path: Path) -> tuple[int, float, float]:
    """Return the rows, the sum of labels and that of weights."""
    try:
        file = pq.ParquetFile(arrow_input(path), page_checksum_verification=True)
        if file.schema_arrow.names != info.column_names:
            raise DataError(
                f"{path} has columns {file.schema_arrow.names}, dataset.json wants "
                f"{info.column_names}"
            )
        positives = weight = 0.0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            positives += _check_group(info, path, table)
            weight += _weight_of(info, path, table)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    return file.metadata.num_rows, positives, weight


def _weight_of(info: DatasetInfo, path: Path, table: pa.Table) -> float:
    if info.weight is None:
        return 0.0
    weights = table.column(info.weight).to_numpy()
    if (weights < 0).any():
        raise DataError(f"{path}: column {info.weight} holds weights below 0")
    return sum_of(weights)


def _check_group(info: DatasetInfo, path: Path, table: pa.Table) -> float:
    weight = () if info.weight is None else (info.weight,)
    for name in (info.label, *weight, *info.numeric_names):
        column = table.column(name)
        if column.type != pa.float32():
            raise DataError(f"{path}: column {name} is {column.type}, expected float")
        if column.null_count or not np.isfinite(column.to_numpy()).all():
            raise DataError(f"{path}: column {name} holds values that are not finite")
    for feature in info.categorical:
        column = table.column(feature.name)
        if pa.types.is_list(column.type) != feature.multi_valued:
            raise DataError(
                f"{path}: column {feature.name} is {column.type}, but multi_valued is "
                f"{feature.multi_valued}"
            )
        ids = pc.list_flatten(column) if feature.multi_valued else column
        if ids.type != pa.int32():
            raise DataError(f"{path}: column {feature.name} holds {ids.type}, expected int32")
        if ids.null_count:
            raise DataError(f"{path}: column {feature.name} holds nulls")
        if not len(ids):
            continue
        span = pc.min_max(ids).as_py()
        if span["min"] < 0 or span["max"] >= feature.num_embeddings:
            raise DataError(
                f"{path}: column {feature.name} holds ids from {span['min']} to {span['max']}, "
                f"expected 0 to {feature.num_embeddings - 1}"
            )
    labels = table.column(info.label).to_numpy()
    if not ((labels == 0) | (labels == 1)).all():
        raise DataError(f"{path}: column {info.label} holds values beside 0 and 1")
    return float(labels.sum(dtype=np.float64))


def _check_vocabulary(folder: Path, feature: CategoricalFeature) -> None:
    if not feature.vocabulary:
        return
    path = folder / feature.vocabulary
    columns = ["id", "count", *(["value"] if feature.holds_ids else [])]
    columns += [] if feature.change is None else ["decayed", "idle"]
    try:
        table = pq.read_table(arrow_input(path), columns=columns, page_checksum_verification=True)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    ids, counts = table.column("id").to_numpy(), table.column("count").to_numpy()
    if len(ids) != feature.num_values:
        raise DataError(
            f"{path} has {len(ids)} values, but {feature.name} has {feature.num_embeddings} "
            f"embeddings, {FIRST_ID + (feature.room or 0)} of them without a value"
        )
    if feature.change is not None:
        inside = not len(ids) or (ids[0] >= FIRST_ID and ids[-1] < feature.num_embeddings)
        decayed, idle = table.column("decayed").to_numpy(), table.column("idle").to_numpy()
        is_whole = (decayed >= counts).all() and ((idle > 0) == (counts == 0)).all()
        if not inside or (np.diff(ids) <= 0).any() or (counts < 0).any() or not is_whole:
            raise DataError(f"{path} is no vocabulary that goes on; prepare the dataset again")
        return
    if feature.holds_ids:
        own = [int(value) for value in table.column("value").to_pylist()]
        inside = not len(ids) or (ids[0] >= FIRST_ID and ids[-1] < feature.num_embeddings)
        if not inside or own != ids.tolist() or (np.diff(ids) <= 0).any() or (counts < 1).any():
            raise DataError(f"{path} is no vocabulary of ids; prepare the dataset again")
        return
    ranked = np.array_equal(ids, np.arange(FIRST_ID, len(ids) + FIRST_ID))
    if not ranked or (np.diff(counts) > 0).any() or (counts < feature.min_count).any():
        raise DataError(f"{path} is not in the order of its counts; prepare the dataset again")
