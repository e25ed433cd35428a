"""Transforms of numeric columns: plain functions of x and of a few figures of the train split."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from embcomp.data_pipelines.schema import NumericFeature
from embcomp.data_pipelines.tabulated import NumberTable, can_tabulate
from embcomp.io.reproducible_sums import pairwise_sum, to_digits

BUCKET = "bucket"
TRANSFORMS = ("none", "log1p", "standard_log", "min_max", BUCKET)
"""`bucket` makes a categorical feature; the others keep a number."""


_LARGEST = float(np.finfo(np.float32).max)
_LOWEST = -(2.0**62)
_LEAST, _TABULATED = -8, 8192
"""Whole numbers whose transforms are looked up: the first, and how many; fewer rows are not worth a table."""


class NumericStats(BaseModel):
    """Figures of one numeric column over the train split; sums are of log1p(max(x, 0))."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    count: int = 0
    log_sum: float = 0.0
    log_squares: float = 0.0
    min: float = math.inf
    max: float = -math.inf

    def update(self, values: pl.Series) -> None:
        """Take in a block of Float64 values; nulls are skipped.

        The logarithms are polars', as those of the transform are: numpy's differ in their last bits
        from version to version.
        """
        numbers = values.drop_nulls().rechunk()
        if not len(numbers):
            return
        x = numbers.to_numpy()
        logs = numbers.clip(lower_bound=0.0).log1p().to_numpy()
        self.count += len(x)
        self.log_sum += pairwise_sum(logs)
        self.log_squares += pairwise_sum(logs * logs)
        self.min = min(self.min, float(x.min()))
        self.max = max(self.max, float(x.max()))

    def merge(self, other: NumericStats) -> None:
        """Take in the figures of another part."""
        self.count += other.count
        self.log_sum += other.log_sum
        self.log_squares += other.log_squares
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)

    def feature(self, name: str, transform: str, missing: int) -> NumericFeature:
        """Describe the column in `dataset.json`, with the constants that its transform needs."""
        feature = {"name": name, "transform": transform, "missing": missing}
        if transform == "standard_log":
            mean = self.log_sum / self.count if self.count else 0.0
            spread = self.log_squares / self.count - mean * mean if self.count else 0.0
            # A constant column becomes 0 instead of a division by zero.
            std = math.sqrt(spread) if spread > 1e-12 else 1.0
            feature |= {"mean": to_digits(mean), "std": to_digits(std)}
        elif transform == "min_max":
            low, high = (self.min, self.max) if self.count else (0.0, 1.0)
            above = max(low + 1.0, math.nextafter(low, math.inf))
            feature |= {"min": low, "max": high if high > low else above}
        return NumericFeature.model_validate(feature)


def numeric_expression(feature: NumericFeature) -> pl.Expr:
    """Return the Float32 column of a feature as an expression of its raw Float64 column."""
    x = pl.col(feature.name)
    if feature.transform == "log1p":
        y = _log1p(x)
    elif feature.transform == "standard_log":
        y = (_log1p(x) - feature.mean) / feature.std
    elif feature.transform == "min_max":
        assert feature.min is not None and feature.max is not None
        # Halves, as the span of the largest numbers is infinite.
        y = ((x / 2 - feature.min / 2) / (feature.max / 2 - feature.min / 2)).clip(0.0, 1.0)
    else:
        y = x.clip(-_LARGEST, _LARGEST)
    return y.cast(pl.Float32).fill_null(0.0).alias(feature.name)


def clipped_expression(feature: NumericFeature) -> pl.Expr:
    """Return how many raw values of a feature its transform cannot represent (see `schema`)."""
    return _is_lost(feature).sum().alias(feature.name)


def _is_lost(feature: NumericFeature) -> pl.Expr:
    x = pl.col(feature.name)
    if feature.transform in ("log1p", "standard_log"):
        return x < 0
    if feature.transform == "min_max":
        return (x < feature.min) | (x > feature.max)
    return x.abs() > _LARGEST


class Transforms:
    """Puts raw Float64 columns through the transforms of numeric features.

    Most numbers of a log are small whole ones: what these become is looked up where there is a compiler, in a
    table that the same expression made.
    """

    def __init__(self, features: Sequence[NumericFeature]) -> None:
        self.features = list(features)
        self._tables: dict[str, NumberTable] = {}

    def apply(self, frame: pl.DataFrame) -> tuple[list[NDArray[np.float32]], dict[str, int]]:
        """Return (B,) float32 of each feature, and by feature how many values cannot be represented."""
        numbers, clipped = [], {}
        for feature in self.features:
            column, count = self._column(feature, frame.get_column(feature.name))
            numbers.append(column)
            clipped[feature.name] = count
        return numbers, clipped

    def _column(self, feature: NumericFeature, raw: pl.Series) -> tuple[NDArray[np.float32], int]:
        if len(raw) < _TABULATED or not can_tabulate():
            return _transformed(feature, raw)
        if feature.name not in self._tables:
            whole = pl.Series(feature.name, np.arange(_LEAST, _LEAST + _TABULATED), pl.Float64)
            lost = whole.to_frame().select(_is_lost(feature)).to_series().to_numpy()
            entries, _ = _transformed(feature, whole)
            self._tables[feature.name] = NumberTable(least=_LEAST, entries=entries, counted=lost)
        found, clipped, left = self._tables[feature.name].look_up(raw)
        if len(left):
            found[left], more = _transformed(feature, raw.gather(left))
            clipped += more
        return found, clipped


def _transformed(feature: NumericFeature, raw: pl.Series) -> tuple[NDArray[np.float32], int]:
    """Transform (N,) numbers; return how many of them the transform cannot represent, too."""
    frame = raw.to_frame(feature.name)
    numbers = frame.select(numeric_expression(feature)).to_series().to_numpy()
    return numbers, int(frame.select(clipped_expression(feature)).item())


def needs_figures(transform: str) -> bool:
    """Whether a transform takes figures of the train split."""
    return transform in ("standard_log", "min_max")


def bucket_expression(name: str) -> pl.Expr:
    """Return the category of a number by the rule of the Criteo challenge's winners.

    x > 2 gives floor(log(x)^2), and any other x its integer part behind "SP", so that the two
    never meet (3 Idiots, 2014, https://github.com/ycjuan/kaggle-2014-criteo).
    """
    x = pl.col(name)
    large = x.log().pow(2).floor().cast(pl.Int64, strict=False).cast(pl.String)
    # No number may turn into a missing one: what has no Int64 shares the lowest bucket.
    low = x.clip(lower_bound=_LOWEST).floor().cast(pl.Int64, strict=False)
    small = pl.lit("SP") + low.cast(pl.String)
    return pl.when(x > 2).then(large).otherwise(small).alias(name)


def _log1p(x: pl.Expr) -> pl.Expr:
    return x.clip(lower_bound=0.0).log1p()
