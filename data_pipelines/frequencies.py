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
from embcomp.io.mapped_arrays import temporary_zeros
from embcomp.io.parquet_batches import batches_of

_AT_ONCE = 1 << 17  # values of a vocabulary that are read together


def id_counts(info: DatasetInfo) -> dict[str, NDArray[np.int64]]:
    """For each categorical feature that has a vocabulary file, (num_embeddings,) train counts.

    Values are counted exactly; in a dataset that extends another, with what earlier ones counted, decayed. The ids for missing and for rare values are not in a vocabulary:
    missing rows are counted over all splits in `dataset.json` and taken here in proportion, and
    what is left of the train rows is rare. Those of a large vocabulary are in a temporary file, which is gone
    once nobody looks at them.

    Raises:
        DataError: a vocabulary cannot be read, or there is no room for the file.
    """
    found = {}
    for feature in counted_features(info):
        what = f"how often ids of {feature.name!r} occur"
        found[feature.name] = temporary_zeros(feature.num_embeddings, what)
        fill_counts(info, feature, found[feature.name])
    return found


def counted_features(info: DatasetInfo) -> list[CategoricalFeature]:
    """The features whose ids were counted."""
    return [feature for feature in info.categorical if feature.vocabulary]


def fill_counts(info: DatasetInfo, feature: CategoricalFeature, counts: NDArray[np.int64]) -> None:
    """Write down how often each id of a feature occurs, a part of its vocabulary at a time.

    Args:
        info: the dataset.
        feature: one of `counted_features`.
        counts: (num_embeddings,) zeros, in memory or in a file.
    """
    path = info.folder / feature.vocabulary
    today = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            goes_on = "decayed" in file.schema_arrow.names
            columns = ["id", "count", *(["decayed"] if goes_on else [])]
            for batch in batches_of(file, _AT_ONCE, columns):
                ids = batch["id"].to_numpy()
                if len(ids) and not FIRST_ID <= ids.min() <= ids.max() < len(counts):
                    raise DataError(
                        f"{path} has ids outside [{FIRST_ID}, {feature.num_embeddings}) of feature "
                        f"{feature.name!r} in dataset.json; prepare the dataset again"
                    )
                today += int(batch["count"].to_numpy().sum())
                found = batch["decayed" if goes_on else "count"].to_numpy()
                counts[ids] = np.rint(found) if goes_on else found
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(
            f"{path} is not a readable vocabulary ({one_line(error)}); prepare the dataset again"
        ) from None
    missing, unseen = _without_value(info, feature, today)
    counts[MISSING_ID], counts[UNSEEN_ID] = missing, unseen


def _without_value(info: DatasetInfo, feature: CategoricalFeature, known: int) -> tuple[int, int]:
    """How often ids 0 and 1 occur in the train split, where so many look-ups go to values of the vocabulary.

    The share of id 1 there is part of the description; where it is not, values are taken to be missing in each
    split alike.
    """
    train = info.split("train")
    share = train.unseen_rate.get(feature.name)
    if feature.multi_valued:
        if share is not None and share < 1:
            return 0, round(known * share / (1 - share))
        return 0, max(0, round(train.rows * feature.mean_length) - known)
    if share is not None:
        unseen = round(train.rows * share)
        return max(0, train.rows - known - unseen), unseen
    rows = sum(split.rows for split in info.splits.values())
    missing = round(feature.missing * train.rows / rows) if rows else 0
    return missing, max(0, train.rows - known - missing)
