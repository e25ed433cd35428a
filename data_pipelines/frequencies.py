"""How often each id occurs in the train split, from the vocabularies of a prepared dataset."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embcomp.data_pipelines.integrity import UNREADABLE
from embcomp.data_pipelines.schema import (
    FIRST_ID,
    MISSING_ID,
    UNSEEN_ID,
    CategoricalFeature,
    DatasetInfo,
)
from embcomp.errors import DataError, one_line


def id_counts(info: DatasetInfo) -> dict[str, NDArray[np.int64]]:
    """For each categorical feature that has a vocabulary file, (num_embeddings,) train counts.

    Values are counted exactly. The ids for missing and for rare values are not in a vocabulary:
    missing rows are counted over all splits in `dataset.json` and taken here in proportion, and
    what is left of the train rows is rare.
    """
    return {
        feature.name: _counts_of(info, feature)
        for feature in info.categorical
        if feature.vocabulary
    }


def _counts_of(info: DatasetInfo, feature: CategoricalFeature) -> NDArray[np.int64]:
    path = info.folder / feature.vocabulary
    try:
        table = pq.read_table(path, columns=["id", "count"], page_checksum_verification=True)
    except UNREADABLE as error:
        raise DataError(
            f"{path} is not a readable vocabulary ({one_line(error)}); prepare the dataset again"
        ) from None
    ids = table["id"].to_numpy()
    if len(ids) and not FIRST_ID <= ids.min() <= ids.max() < feature.num_embeddings:
        raise DataError(
            f"{path} has ids outside [{FIRST_ID}, {feature.num_embeddings}) of feature "
            f"{feature.name!r} in dataset.json; prepare the dataset again"
        )
    counts = np.zeros(feature.num_embeddings, dtype=np.int64)
    counts[ids] = table["count"].to_numpy()
    train = info.split("train").rows
    rows = sum(split.rows for split in info.splits.values())
    missing = round(feature.missing * train / rows) if rows else 0
    values = round(train * feature.mean_length) if feature.multi_valued else train
    counts[MISSING_ID] = 0 if feature.multi_valued else missing
    counts[UNSEEN_ID] = max(0, values - int(counts.sum()))
    return counts
