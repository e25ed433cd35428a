"""Which id a value of one dataset had in an earlier one, whatever its number is now."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embcomp.data_pipelines.integrity import UNREADABLE
from embcomp.data_pipelines.preparing.lookup import ValueIndex
from embcomp.data_pipelines.schema import (
    FIRST_ID,
    MISSING_ID,
    UNSEEN_ID,
    CategoricalFeature,
    DatasetInfo,
)
from embcomp.errors import DataError, one_line

_AT_ONCE = 1 << 17  # values that are read together


@dataclass(frozen=True, kw_only=True)
class FollowedValues:
    """The values of a feature, and which of them an earlier dataset knew.

    Attributes:
        before: (num_embeddings,) int64 the earlier id; -1 where an id has no value, or a new one.
        has_value: (num_embeddings,) bool; the ids for missing and for unseen values count as such.
        new: how many values are new.
        retired: how many earlier ones are not there any more.
        kept_share: the share of the train split's look-ups that go to values known before.
        new_share: that of new ones; the rest has no value, or a rare one.
    """

    before: NDArray[np.int64]
    has_value: NDArray[np.bool_]
    new: int
    retired: int
    kept_share: float
    new_share: float

    @property
    def kept(self) -> int:
        """How many values were known before."""
        return int(self.has_value.sum()) - FIRST_ID - self.new


def follow_values(earlier: DatasetInfo, info: DatasetInfo, name: str) -> FollowedValues:
    """Find a feature's values in an earlier dataset.

    The earlier vocabulary is held as an index of some 22 bytes a value (`ValueIndex`), today's is read
    a part at a time.

    Args:
        earlier: the earlier dataset.
        info: the dataset of today.
        name: a categorical feature of both.

    Raises:
        DataError: a vocabulary is missing or cannot be read.
    """
    theirs, ours = _feature(earlier, name), _feature(info, name)
    before = np.full(ours.num_embeddings, -1, dtype=np.int64)
    before[[MISSING_ID, UNSEEN_ID]] = MISSING_ID, UNSEEN_ID
    has_value = before >= 0
    index = ValueIndex(earlier.folder / theirs.vocabulary, 0, theirs.num_values)
    new = kept_lookups = new_lookups = 0
    path = info.folder / ours.vocabulary
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=_AT_ONCE, columns=["id", "value", "count"]):
                values = pl.Series(batch["value"]).cast(pl.String)
                found = index.ids(values).astype(np.int64)
                known = found != UNSEEN_ID
                ids, counts = batch["id"].to_numpy(), batch["count"].to_numpy()
                before[ids] = np.where(known, found, -1)
                has_value[ids] = True
                new += int((~known).sum())
                kept_lookups += int(counts[known].sum())
                new_lookups += int(counts[~known].sum())
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    rows = info.split("train").rows
    total = max(1, round(rows * ours.mean_length) if ours.multi_valued else rows)
    return FollowedValues(
        before=before,
        has_value=has_value,
        new=new,
        retired=theirs.num_values - (int(has_value.sum()) - FIRST_ID - new),
        kept_share=kept_lookups / total,
        new_share=new_lookups / total,
    )


def _feature(info: DatasetInfo, name: str) -> CategoricalFeature:
    feature = next(each for each in info.categorical if each.name == name)
    if not feature.vocabulary:
        raise DataError(
            f"{info.folder}: feature {name!r} has no vocabulary, so that its ids cannot be told from "
            f"others; prepare the dataset with `embcomp prepare`"
        )
    return feature
