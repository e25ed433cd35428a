"""Ids that raw rows hold already: checked against what the schema says, and kept as they are.

Id 0 is the missing value and 1 an unseen one, as ever; the others mean what their maker meant.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from embcomp.data_pipelines.preparing.features import Features, flat_values
from embcomp.data_pipelines.schema import MISSING_ID
from embcomp.errors import DataError

_NUMBER = r"^(0|[1-9][0-9]{0,9})$"


class GivenIds:
    """Ids of a feature whose values are ids."""

    def __init__(self, name: str, num_embeddings: int) -> None:
        self._name = name
        self._num_embeddings = num_embeddings

    def ids(self, values: pl.Series) -> np.ndarray:
        """Return the (N,) int32 ids of N values (String); a null gets id 0.

        Raises:
            DataError: a value is no id of the feature.
        """
        numbers = self.numbers(values)
        return numbers.fill_null(MISSING_ID).cast(pl.Int32).to_numpy()

    def numbers(self, values: pl.Series) -> pl.Series:
        """Return the Int64 ids of values, null where they are null."""
        found = values.cast(pl.Int64, strict=False)
        plain = values.str.contains(_NUMBER) & (found < self._num_embeddings)
        odd = values.filter(~plain.fill_null(True))
        if len(odd):
            raise DataError(
                f"the feature {self._name!r} holds {odd[0]!r}, which is no id of it; expected whole "
                f"numbers from 0 (missing) to {self._num_embeddings - 1}, as the schema says "
                f"num_embeddings: {self._num_embeddings}"
            )
        return found


def check_given_ids(frame: pl.DataFrame, features: Features, place: str) -> None:
    """Raise a DataError where a block holds what is no id.

    Args:
        frame: the block's columns, as `Features.columns` gives them.
        features: of the dataset.
        place: what the block is of.
    """
    for feature in features.categorical:
        if feature.num_embeddings is None:
            continue
        column = frame.get_column(feature.name)
        values = flat_values(column) if feature.multi_valued else column
        try:
            GivenIds(feature.name, feature.num_embeddings).numbers(values)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
