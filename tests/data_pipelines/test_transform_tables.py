"""Numbers that are looked up are what the transform's own expression makes of them, to the bit."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from embcomp.data_pipelines import tabulated, transforms
from embcomp.data_pipelines.schema import NumericFeature
from embcomp.data_pipelines.transforms import Transforms, clipped_expression, numeric_expression

FEATURES = [
    NumericFeature(name="a", transform="none"),
    NumericFeature(name="b", transform="log1p"),
    NumericFeature(name="c", transform="standard_log", mean=1.25, std=0.75),
    NumericFeature(name="d", transform="min_max", min=-3.0, max=70_000.0),
]
ODD = [None, float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 0.5, -0.5, 1e300, -1e300]
ODD += [2.0**63, -(2.0**63), -9.0, -8.0, -1.0, 8183.0, 8184.0, 8183.5, 1e-310]


def column(rng: np.random.Generator, rows: int) -> pl.Series:
    whole = rng.integers(-20, 9000, rows).astype(np.float64)
    values = np.where(rng.random(rows) < 0.8, whole, rng.normal(0, 1e4, rows)).tolist()
    for at, value in zip(rng.permutation(rows).tolist(), ODD):
        values[at] = value
    return pl.Series(values, dtype=pl.Float64)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "no compiler"])
@pytest.mark.parametrize("rows", [40, 20_000], ids=["few rows", "many rows"])
def test_looked_up_numbers_are_those_of_the_expression(rows, compiled, monkeypatch):
    assert transforms._TABULATED < 20_000
    if not compiled:
        monkeypatch.setattr(tabulated, "_library", lambda: None)
    rng = np.random.default_rng(3)
    frame = pl.DataFrame({feature.name: column(rng, rows) for feature in FEATURES})
    applied = Transforms(FEATURES)
    for part in (frame, frame, frame.slice(13)):
        numbers, clipped = applied.apply(part)
        for feature, found in zip(FEATURES, numbers):
            wanted = part.select(numeric_expression(feature)).to_series().to_numpy()
            assert found.dtype == np.float32
            assert found.view(np.uint32).tolist() == wanted.view(np.uint32).tolist(), feature.name
        counts = part.select(clipped_expression(feature) for feature in FEATURES)
        assert clipped == counts.row(0, named=True)
