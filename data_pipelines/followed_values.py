"""Which id a value of one dataset had in an earlier one, whatever its number is now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embcomp.data_pipelines.integrity import UNREADABLE
from embcomp.data_pipelines.preparing.lookup import BYTES_PER_VALUE, ValueIndex
from embcomp.data_pipelines.schema import (
    MISSING_ID,
    UNSEEN_ID,
    CategoricalFeature,
    DatasetInfo,
)
from embcomp.errors import DataError, one_line
from embcomp.io.parquet_batches import batches_of

NOT_USED = -1
"""In place of an earlier id: this one has no value."""
NEW = -2
"""In place of an earlier id: this one's value is new."""
_AT_ONCE = 1 << 17  # values that are read together


@dataclass(frozen=True, kw_only=True)
class FollowedValues:
    """What became of the values of a feature.

    Attributes:
        kept: how many values an earlier dataset knew.
        new: how many are new.
        retired: how many earlier ones are not there any more.
        kept_share: the share of the train split's look-ups that go to values known before.
        new_share: that of new ones; the rest has no value, or a rare one.
    """

    kept: int
    new: int
    retired: int
    kept_share: float
    new_share: float


def follow_values(
    earlier: DatasetInfo, info: DatasetInfo, name: str, before: NDArray[np.int64], memory: int
) -> FollowedValues:
    """Find a feature's values in an earlier dataset.

    Args:
        earlier: the earlier dataset.
        info: the dataset of today.
        name: a categorical feature of both.
        before: (num_embeddings,) is filled with the earlier id of each id; `NOT_USED` where it has no
            value, `NEW` where it has a new one. The ids for missing and for unseen values keep theirs.
        memory: bytes that an index of the earlier vocabulary may take.

    Raises:
        DataError: a vocabulary is missing or cannot be read.
    """
    theirs, ours = _feature(earlier, name), _feature(info, name)
    before.fill(NOT_USED)
    before[[MISSING_ID, UNSEEN_ID]] = MISSING_ID, UNSEEN_ID
    kept = values = kept_lookups = lookups = 0
    for match in _matches(earlier, info, name, memory):
        if match.is_first:
            before[match.ids] = NEW
            values, lookups = values + len(match.ids), lookups + int(match.counts.sum())
        before[match.ids[match.known]] = match.found[match.known]
        kept += int(match.known.sum())
        kept_lookups += int(match.counts[match.known].sum())
    rows = info.split("train").rows
    total = max(1, round(rows * ours.mean_length) if ours.multi_valued else rows)
    return FollowedValues(
        kept=kept,
        new=values - kept,
        retired=theirs.num_values - kept,
        kept_share=kept_lookups / total,
        new_share=(lookups - kept_lookups) / total,
    )


def moved_values(earlier: DatasetInfo, info: DatasetInfo, name: str, memory: int) -> int:
    """How many of a feature's values have another id than in an earlier dataset.

    Args:
        earlier: the earlier dataset.
        info: the dataset of today.
        name: a categorical feature of both.
        memory: bytes that an index of the earlier vocabulary may take.

    Raises:
        DataError: a vocabulary is missing or cannot be read.
    """
    return sum(
        int((match.known & (match.found != match.ids)).sum())
        for match in _matches(earlier, info, name, memory)
    )


@dataclass(frozen=True, kw_only=True)
class _Match:
    """Some of today's values, held against a part of the earlier ones.

    Attributes:
        ids: (n,) today's ids.
        counts: (n,) how often they occur in the train split.
        found: (n,) the earlier ids.
        known: (n,) bool whether there is one in this part.
        is_first: whether it is the first part, so that all of today's values come once with this.
    """

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]
    found: NDArray[np.int64]
    known: NDArray[np.bool_]
    is_first: bool


def _matches(earlier: DatasetInfo, info: DatasetInfo, name: str, memory: int) -> Iterator[_Match]:
    """Today's values some at a time, once for each part of the earlier vocabulary that is indexed at once."""
    theirs, path = _feature(earlier, name), info.folder / _feature(info, name).vocabulary
    size = max(1, memory // BYTES_PER_VALUE)
    for start in range(0, max(1, theirs.num_values), size):
        stop = min(start + size, theirs.num_values)
        index = ValueIndex(earlier.folder / theirs.vocabulary, start, stop)
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                columns = ["id", "value", "count"]
                for batch in batches_of(file, _AT_ONCE, columns):
                    values = pl.Series(batch["value"]).cast(pl.String)
                    found = index.ids(values).astype(np.int64)
                    yield _Match(
                        ids=batch["id"].to_numpy(),
                        counts=batch["count"].to_numpy(),
                        found=found,
                        known=found != UNSEEN_ID,
                        is_first=start == 0,
                    )
        except UNREADABLE as error:
            raise DataError(f"{path} cannot be read: {one_line(error)}") from None
        del index  # before the next one is built


def _feature(info: DatasetInfo, name: str) -> CategoricalFeature:
    feature = next(each for each in info.categorical if each.name == name)
    if not feature.vocabulary:
        raise DataError(
            f"{info.folder}: feature {name!r} has no vocabulary, so that its ids cannot be told from "
            f"others; prepare the dataset with `embcomp prepare`"
        )
    return feature
