"""ROBE: one array for all tables, in which an embedding is a few blocks by hash."""

from __future__ import annotations

import pytest
import torch

from embcomp import ConfigError, Hash, Robe
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.tables.specs import specs_from_configs
from embcomp.testing import BackendCase, check_backend
from embcomp.testing.cases import embed_ids, pooled
from embcomp.testing.check_data import plain_tables
from embcomp.testing.planted import plant
from tests.helpers.learned_cases import Clicks, auc, fit

TABLES = plain_tables(10, rows=(90, 60))


def one_row(value, salt, rows):
    ids, salts, counts = (torch.tensor([n]) for n in (value, salt, rows))
    return int(hash_rows(ids, salts, counts))


@pytest.mark.parametrize("signs", [False, True])
def test_an_embedding_is_blocks_of_the_array_from_hashed_places_on(signs):
    """Written out weight by weight: 10 columns of blocks of 6 in steps of 2, around the end."""
    method = Robe(num_weights=41, block_size=6, step=2, signs=signs)
    assert method.rows == 20
    collection = pooled(BackendCase(config=method), TABLES)
    (weight,) = collection.rows.parameters()
    array, found = weight[:, :2].reshape(-1), embed_ids(collection, TABLES)["f1"]
    for value in (0, 7, 59):
        for column in range(10):
            block, inside = divmod(column, 6)
            first = 2 * one_row(value, table_salt(2021, "t1", block), 20)
            wanted = array[(first + inside) % 40]
            if signs and one_row(value, table_salt(2021, "t1", (1 << 32) + column // 2), 2):
                wanted = -wanted
            assert found[value, column] == wanted


def test_all_tables_are_within_the_array_and_small_ones_may_be_beside():
    specs = specs_from_configs([table.bag() for table in TABLES])
    method = Robe().fit_budget(specs, "10%")
    full = sum(spec.full_bytes for spec in specs)
    assert full // 10 - 16 < method.footprint(specs).serve_bytes <= full // 10
    beside = Robe(num_weights=40, collisionless=60)
    assert [beside.keeps_full(spec) for spec in specs] == [False, True]
    assert beside.footprint(specs).serve_bytes == 4 * (40 + 600)


def test_blocks_that_steps_do_not_make_are_refused():
    with pytest.raises(ConfigError, match=r"robe: block_size must be a multiple of step.* 6 and 4"):
        Robe(num_weights=40, block_size=6)


@pytest.mark.long
def test_without_signs_every_check_passes():
    check_backend(
        BackendCase(config=Robe(num_weights=700), takes_any_id=True, init_std=0.05 / 3**0.5)
    )


def test_it_beats_hashing_in_equal_bytes_where_every_id_means_something():
    planted, scores = plant(seed=3), {}
    for method in (Hash(num_buckets=60, collisionless=0), Robe(num_weights=4 * 60 * 8)):
        torch.manual_seed(0)
        model = Clicks(planted, method, 8)
        fit(model, planted, epochs=3)
        assert model.tables.footprint.serve_bytes == 4 * 60 * 8 * 4
        scores[method.name] = auc(model, planted)
    assert scores["robe"] > scores["hash"] + 0.02
