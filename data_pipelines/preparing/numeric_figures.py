"""Numeric features with the figures of their transforms: of this input, or of the dataset that it extends."""

from __future__ import annotations

from embcomp.data_pipelines.preparing.counting import PartCounts
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.schema import NumericFeature
from embcomp.data_pipelines.transforms import NumericStats, needs_figures


def known_figures(settings: PrepareSettings) -> dict[str, NumericFeature]:
    """Return, by name, the numeric features whose transforms take nothing from this input."""
    every = numeric_features(settings, PartCounts())
    return {
        feature.name: feature
        for feature in every
        if settings.before is not None or not needs_figures(feature.transform)
    }


def numeric_features(settings: PrepareSettings, counts: PartCounts) -> list[NumericFeature]:
    """Return the numeric features with what their transforms take from the train split.

    A dataset that extends another takes the other's figures: a number means today what it meant then.
    """
    found = []
    for column in settings.features.numeric:
        missing = counts.numeric_missing.get(column.name, 0)
        stats = counts.numeric.get(column.name, NumericStats())
        found.append(stats.feature(column.name, column.transform, missing))
    if settings.before is None:
        return found
    return [
        then.model_copy(update={"missing": now.missing, "clipped": 0})
        for then, now in zip(settings.before.numeric, found)
    ]
