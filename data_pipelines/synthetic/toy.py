"""A small prepared dataset made directly, for tests and for trying a recipe without raw logs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embcomp.data_pipelines.integrity import record_of
from embcomp.data_pipelines.sample_weights import WEIGHT_COLUMN, sum_of
from embcomp.data_pipelines.schema import (
    FIRST_ID,
    MISSING_ID,
    UNSEEN_ID,
    CategoricalFeature,
    DatasetInfo,
    NumericFeature,
    SplitInfo,
)
from embcomp.io.reproducible_sums import to_digits

SPLITS = ("train", "valid", "test")
_MISSING_RATE = 0.05
_UNSEEN_RATE = 0.02
_MAX_LENGTH = 4

Ids = NDArray[np.int32]


def write_toy_dataset(
    folder: str | Path,
    *,
    rows: Sequence[int] = (512, 128, 128),
    num_values: Sequence[int] = (60, 30, 8),
    multi_valued: Collection[str] = (),
    num_numeric: int = 2,
    group: str | None = None,
    weights: Sequence[float] = (),
    files_per_split: int = 1,
    row_group_rows: int = 100,
    name: str = "toy",
    seed: int = 0,
) -> DatasetInfo:
    """Write a learnable dataset of features C1, C2, ... and I1, I2, ... and return its description.

    The ids follow the rules of `prepare`: 0 is missing, 1 unseen in train, then by descending train
    frequency. Every value occurs in train, so feature Ck has exactly `num_values[k-1] + 2` rows.

    Args:
        folder: made if it is not there.
        rows: of the train, valid and test split.
        num_values: distinct values of each categorical feature.
        multi_valued: names of the features that hold lists of 0 to 4 ids.
        num_numeric: how many numeric features.
        group: name of the feature that grouped AUC groups by.
        weights: what each row's weight is drawn from, if rows are to have weights.
        files_per_split: Parquet files that each split is cut into.
        row_group_rows: rows of a Parquet row group.
        name: the dataset's name.
        seed: same arguments and seed, same dataset.
    """
    folder = Path(folder)
    names = [f"C{i + 1}" for i in range(len(num_values))]
    unknown = sorted(set(multi_valued) - set(names))
    if unknown:
        raise ValueError(f"multi_valued names {unknown}; the features are {names}")
    if len(rows) != len(SPLITS) or max(num_values, default=0) > rows[0]:
        raise ValueError(
            f"rows must be (train, valid, test) with at least {max(num_values, default=0)} train "
            f"rows, so that every value occurs; got {tuple(rows)}"
        )
    rng = np.random.default_rng(seed)
    total, train = sum(rows), rows[0]
    numeric = rng.normal(size=(num_numeric, total)).astype(np.float32)
    score = rng.normal(size=num_numeric) @ numeric
    columns: dict[str, tuple[Ids, NDArray[np.int64]]] = {}
    for feature, count in zip(names, num_values):
        lengths = np.ones(total, dtype=np.int64)
        if feature in multi_valued:
            lengths = rng.integers(0, _MAX_LENGTH + 1, size=total)
            lengths[:train] = np.maximum(lengths[:train], 1)
        ids = _draw_ids(rng, lengths, train, count)
        effect = rng.normal(size=count + FIRST_ID)
        row_of_value = np.repeat(np.arange(total), lengths)
        score += np.bincount(row_of_value, weights=effect[ids], minlength=total)
        columns[feature] = (ids, lengths)
    labels = (rng.random(total) < 1 / (1 + np.exp(-score))).astype(np.float32)

    info = DatasetInfo(
        name=name,
        weight=WEIGHT_COLUMN if weights else None,
        group=group,
        numeric=[NumericFeature(name=f"I{i + 1}") for i in range(num_numeric)],
        categorical=[
            _describe(feature, *columns[feature], count, train, feature in multi_valued)
            for feature, count in zip(names, num_values)
        ],
        splits={},
        split_rule={"kind": "toy", "seed": seed},
    )
    table = pa.table(
        {"label": labels}
        | (
            {WEIGHT_COLUMN: rng.choice(np.asarray(weights, np.float32), size=total)}
            if weights
            else {}
        )
        | {f"I{i + 1}": numeric[i] for i in range(num_numeric)}
        | {f: _to_arrow(*columns[f], f in multi_valued) for f in names}
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write_vocabularies(folder, info, columns, train)
    stop = 0
    for split, count in zip(SPLITS, rows):
        start, stop = stop, stop + count
        info.splits[split] = _write_split(
            folder, info, split, table.slice(start, count), files_per_split, row_group_rows
        )
        for feature in names:
            part = _values_of_rows(*columns[feature], start, stop)
            rate = float((part == UNSEEN_ID).mean()) if len(part) else 0.0
            info.splits[split].unseen_rate[feature] = rate
    info.save(folder)
    return info


def _draw_ids(rng: np.random.Generator, lengths: NDArray[np.int64], train: int, count: int) -> Ids:
    """Zipf values with missing and unseen ones, ranked by their train frequency."""
    size, seen = int(lengths.sum()), int(lengths[:train].sum())
    weights = 1.0 / np.arange(1, count + 1)
    values = rng.choice(count, size=size, p=weights / weights.sum())
    missing = rng.random(size) < _MISSING_RATE
    unseen = rng.random(size) < _UNSEEN_RATE
    unseen[:seen] = False
    each_value_once = rng.permutation(seen)[:count]
    values[each_value_once] = np.arange(count)
    missing[each_value_once] = False
    counts = np.bincount(values[:seen][~missing[:seen]], minlength=count)
    id_of_value = np.empty(count, dtype=np.int32)
    id_of_value[np.lexsort((np.arange(count), -counts))] = np.arange(count) + FIRST_ID
    ids = id_of_value[values]
    ids[unseen] = UNSEEN_ID
    ids[missing] = MISSING_ID
    return ids


def _values_of_rows(ids: Ids, lengths: NDArray[np.int64], start: int, stop: int) -> Ids:
    first = int(lengths[:start].sum())
    return ids[first : first + int(lengths[start:stop].sum())]


def _describe(
    name: str, ids: Ids, lengths: NDArray[np.int64], count: int, train: int, multi_valued: bool
) -> CategoricalFeature:
    counts = np.bincount(_values_of_rows(ids, lengths, 0, train), minlength=count + FIRST_ID)
    share = np.cumsum(counts) / counts.sum()
    quantiles = {str(q): int(np.searchsorted(share, q)) for q in (0.5, 0.9)}
    return CategoricalFeature(
        name=name,
        num_embeddings=count + FIRST_ID,
        multi_valued=multi_valued,
        max_length=int(lengths.max()),
        mean_length=float(lengths.mean()),
        num_raw_values=count,
        frequency_quantiles=quantiles,
        vocabulary=f"vocabulary/{name}.parquet",
        missing=int((lengths == 0).sum() if multi_valued else (ids == MISSING_ID).sum()),
    )


def _to_arrow(ids: Ids, lengths: NDArray[np.int64], multi_valued: bool) -> pa.Array:
    if not multi_valued:
        return pa.array(ids)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))


def _write_vocabularies(
    folder: Path,
    info: DatasetInfo,
    columns: dict[str, tuple[Ids, NDArray[np.int64]]],
    train: int,
) -> None:
    (folder / "vocabulary").mkdir(exist_ok=True)
    for feature in info.categorical:
        in_train = _values_of_rows(*columns[feature.name], 0, train)
        counts = np.bincount(in_train, minlength=feature.num_embeddings)[FIRST_ID:]
        ids = np.arange(FIRST_ID, feature.num_embeddings, dtype=np.int32)
        values = [f"{feature.name}-{i}" for i in ids]
        table = pa.table({"id": ids, "value": values, "count": counts.astype(np.int64)})
        pq.write_table(table, folder / feature.vocabulary, write_page_checksum=True)
        info.checksums[feature.vocabulary] = record_of(folder / feature.vocabulary)


def _write_split(
    folder: Path,
    info: DatasetInfo,
    split: str,
    table: pa.Table,
    num_files: int,
    row_group_rows: int,
) -> SplitInfo:
    (folder / split).mkdir(exist_ok=True)
    cuts = np.linspace(0, len(table), num_files + 1).astype(int)
    files = []
    for part, (start, stop) in enumerate(pairwise(cuts)):
        file = f"{split}/part-{part:05d}.parquet"
        rows = table.slice(start, stop - start)
        pq.write_table(rows, folder / file, row_group_size=row_group_rows, write_page_checksum=True)
        info.checksums[file] = record_of(folder / file, int(np.asarray(rows["label"]).sum()))
        files.append(file)
    positives = int(np.asarray(table["label"]).sum())
    weight = None if info.weight is None else to_digits(sum_of(np.asarray(table[info.weight])))
    return SplitInfo(files=files, rows=len(table), positives=positives, weight=weight)
