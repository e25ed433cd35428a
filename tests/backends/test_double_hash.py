"""Frequency double hashing: frequent ids alone in their rows, the others told apart by two."""

from __future__ import annotations

import pytest
import torch

from embcomp import ConfigError, DoubleHash, Hash
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.tables.specs import TableSpec, specs_from_configs
from embcomp.testing.check_data import batch_of, plain_tables
from embcomp.testing.planted import plant
from tests.helpers.learned_cases import Clicks, auc, fit

TABLES = plain_tables(8, rows=(1000,))
METHOD = DoubleHash(num_buckets=100, private_share=0.3)


def rows_of(collection, ids):
    """The bag of physical rows of each id."""
    pooled, _, _ = collection.route(batch_of({"f0": [[each] for each in ids]}))
    return [bag.tolist() for bag in pooled.values().split(pooled.lengths().tolist())]


def test_a_frequent_id_reads_its_row_once_and_any_other_two_of_the_rows_behind():
    collection = CompressedEmbeddingBagCollection([t.bag() for t in TABLES], METHOD)
    assert rows_of(collection, [0, 29]) == [[0], [29]]
    others = rows_of(collection, [*range(30, 1000), 10**12, -5])
    assert all(len(bag) == 2 and min(bag) >= 30 and max(bag) < 100 for bag in others)
    assert (
        len({tuple(sorted(bag)) for bag in others}) > 700
    )  # of 2485 pairs, where hash has 70 rows
    weight = next(collection.rows.parameters())
    found = collection(batch_of({"f0": [[7], [500, 7]]}))["f0"]
    torch.testing.assert_close(found[0], weight[7])
    torch.testing.assert_close(found[1] - found[0], weight[rows_of(collection, [500])[0]].sum(0))


def test_a_row_for_every_id_is_the_full_table_and_none_private_hashes_all():
    (spec,) = specs_from_configs([table.bag() for table in TABLES])
    assert DoubleHash(ratio=1.0).keeps_full(spec)
    assert DoubleHash(num_buckets=1, private_share=0.9).private_rows(spec) == 0  # one is shared
    assert not DoubleHash(num_buckets=9, private_share=0).needs_ranked_ids
    with pytest.raises(ConfigError, match=r"private_share must be in \[0, 1\), got 1"):
        DoubleHash(private_share=1)


def test_ids_that_are_not_ranked_by_frequency_are_refused_by_table():
    table = TableSpec(name="t", num_embeddings=1000, embedding_dim=4, feature_names=("f",))
    rising = torch.arange(1000)
    METHOD.check_ids([table], {"t": rising.flip(0)})
    METHOD.check_ids([table], {})
    with pytest.raises(
        ConfigError, match=r"double_hash: ids of table 't' are not ranked.*private_share: 0"
    ):
        METHOD.check_ids([table], {"t": rising})
    DoubleHash(num_buckets=100, private_share=0).check_ids([table], {"t": rising})


def test_it_beats_hashing_in_equal_bytes_where_every_id_means_something():
    planted = plant(seed=3)
    scores = {}
    for kind in (Hash, DoubleHash):
        method = kind(num_buckets=60, collisionless=0)
        torch.manual_seed(0)
        model = Clicks(planted, method, 8)
        fit(model, planted, epochs=3)
        assert model.tables.footprint.serve_bytes == 4 * 60 * 8 * 4
        scores[kind] = auc(model, planted)
    assert scores[DoubleHash] > scores[Hash] + 0.02
