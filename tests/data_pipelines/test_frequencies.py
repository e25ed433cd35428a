"""How often ids occur in the train split, as the description and the vocabularies tell, beside a count of its rows."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from embcomp.data_pipelines.frequencies import id_counts
from embcomp.data_pipelines.prepare import prepare
from tests.helpers.raw_logs import read_split

SCHEMA = """
name: x
label: click
categorical:
  - {name: site}
  - {name: tags, multi_valued: true, separator: "|"}
"""


def column(generator, rows, missing_before, missing_after):
    """Values of which few are missing in the first rows and many in the last, or the other way round."""
    values = generator.zipf(1.7, rows).clip(max=40)
    share = np.where(np.arange(rows) < 0.8 * rows, missing_before, missing_after)
    return [None if lost else f"v{v}" for v, lost in zip(values, generator.random(rows) < share)]


@pytest.mark.parametrize("missing", [(0.05, 0.6), (0.6, 0.05), (0.0, 0.0), (1.0, 0.2)], ids=str)
@pytest.mark.parametrize("min_count", [1, 4])
def test_ids_are_counted_in_the_train_split_alone(missing, min_count, tmp_path):
    generator, rows = np.random.default_rng(5), 700
    bags = [
        "|".join(f"t{t}" for t in generator.zipf(1.7, n)) for n in generator.integers(0, 4, rows)
    ]
    frame = pl.DataFrame(
        {
            "click": generator.integers(0, 2, rows),
            "site": pl.Series(column(generator, rows, *missing), dtype=pl.String),
            "tags": bags,
        }
    )
    frame.write_parquet(tmp_path / "rows.parquet")
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    info = prepare(
        tmp_path / "rows.parquet",
        tmp_path / "out",
        importer="table",
        schema=tmp_path / "schema.yaml",
        split="chronological",
        min_count=min_count,
    )
    counts, train = id_counts(info), read_split(info, "train")
    for feature in info.categorical:
        ids = train[feature.name].explode() if feature.multi_valued else train[feature.name]
        counted = np.bincount(ids.drop_nulls().to_numpy(), minlength=feature.num_embeddings)
        assert counts[feature.name].tolist() == counted.tolist(), feature.name
