"""Like rows are stored once: within the tolerance, within the budget, their map billed."""

from __future__ import annotations

import copy

import pytest
import torch

from embcomp import BudgetError, Dedup, Full, Hash, compress_, load, save
from embcomp.backends.mapped.row_codes import bits_for_rows
from embcomp.testing.cases import BackendCase, embed_ids, pooled
from embcomp.testing.check_data import plain_tables, random_batch
from embcomp.testing.planted import plant
from tests.helpers.learned_cases import TRAIN, Clicks, auc, fit

TABLES = plain_tables(8, rows=(600, 500))


def full_of(rows):
    collection = pooled(BackendCase(config=Full()), TABLES)
    with torch.no_grad():
        for name, own in rows.items():
            collection.rows.embedding_bags[name].weight.copy_(own)
    return collection


def repeated(noise=0.0):
    """Rows of 40 and 30 kinds."""
    random = torch.Generator().manual_seed(0)
    found = {}
    for table, kinds in zip(TABLES, (40, 30)):
        each = torch.randn(kinds, 8, generator=random)
        which = torch.randint(0, kinds, (table.rows,), generator=random)
        found[table.name] = each[which] + noise * torch.rand(table.rows, 8, generator=random)
    return found


def test_equal_rows_share_one_and_nothing_else_changes(tmp_path):
    rows = repeated()
    collection = pooled(BackendCase(config=Dedup()), TABLES)
    collection.load_state_dict(
        {**collection.state_dict(), **full_of(rows).state_dict()}, strict=False
    )
    served = collection.compact()
    method = served.plan.methods["t0"]
    assert method.name == "mapped" and method.rows == {"t0": (40,), "t1": (30,)}
    batch = random_batch(TABLES, seed=1, batch_size=200)
    assert torch.equal(served(batch).values(), collection(batch).values())
    codes = -(-600 * 6 // 8) + -(-500 * 5 // 8)
    assert served.footprint.serve_bytes == 70 * 8 * 4 + codes
    save(collection, tmp_path / "a")
    torch.testing.assert_close(load(tmp_path / "a")(batch).values(), collection(batch).values())
    again = pooled(BackendCase(config=Dedup()), TABLES, seed=4).compact()  # rows that all differ
    assert {each.name for each in again.plan.methods.values()} == {"full"}


def test_rows_share_within_the_tolerance_and_frequent_ids_pull_more():
    rows = repeated(noise=0.004)
    model = torch.nn.Sequential(full_of(rows))
    counts = {table.name: torch.ones(table.rows) for table in TABLES}
    counts["t0"][0] = 1e6
    compress_(model, Dedup(tolerance=0.02), counts=counts)
    found = embed_ids(model[0], TABLES)
    for n, table in enumerate(TABLES):
        apart = (found[f"f{n}"] - rows[table.name]).abs()
        assert 0 < float(apart.max()) <= 0.02
    assert float((found["f0"][0] - rows["t0"][0]).abs().max()) < 1e-5
    assert len(found["f0"].unique(dim=0)) < 300


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05])
def test_a_budget_takes_the_smallest_tolerance_that_fits(share):
    rows = {table.name: torch.randn(table.rows, 8) for table in TABLES}
    model = torch.nn.Sequential(full_of(rows))
    budget = int(1100 * 32 * share)
    compress_(model, Dedup(budget=budget))
    tables = model[0]
    tensors = tables.serving_tensors().values()
    assert sum(t.numel() * t.element_size() for t in tensors) == tables.footprint.serve_bytes
    assert tables.footprint.serve_bytes <= budget
    method = tables.plan.methods["t0"]
    finer = sum(table.rows for table in TABLES)
    assert 2 <= sum(own[0] for own in method.rows.values()) < finer
    error = float((embed_ids(tables, TABLES)["f0"] - rows["t0"]).abs().max())
    assert error < 16
    with pytest.raises(BudgetError):
        compress_(torch.nn.Sequential(full_of(rows)), Dedup(budget=40))


def test_the_map_is_billed_whatever_the_ratio():
    specs = pooled(BackendCase(config=Full()), TABLES).plan.tables
    for ratio in (0.5, 0.1, 0.01):
        served = Dedup(ratio=ratio).footprint(specs)
        rows = [max(1, int(table.rows * ratio)) for table in TABLES]
        codes = [-(-t.rows * bits_for_rows(n) // 8) for t, n in zip(TABLES, rows)]
        assert served.serve_bytes == sum(rows) * 32 + sum(codes)
        assert served.train_weight_bytes == 1100 * 32
    assert Dedup().footprint(specs).serve_bytes == 1100 * 32


def test_sharing_like_rows_beats_sharing_by_hash_at_equal_bytes():
    """Ids move the label one way or the other: trained rows are of few kinds, which a hash mixes."""
    planted = plant(num_values=(3000,) * 4, seed=0)
    torch.manual_seed(0)
    full = Clicks(planted, Full(), 8)
    fit(full, planted, epochs=2)
    shared = copy.deepcopy(full)
    compress_(shared, Dedup(budget="10%"), counts=planted.counts(TRAIN))
    assert shared.tables.footprint.serve_bytes <= 4 * 3000 * 8 * 4 // 10
    torch.manual_seed(0)
    hashed = Clicks(planted, Hash(collisionless=0).fit_budget(full.specs, "10%"), 8)
    fit(hashed, planted, epochs=2)
    scores = [auc(model, planted) for model in (full, shared, hashed)]
    assert scores[1] > scores[2] + 0.01, scores
    assert scores[1] > scores[0] - 0.03, scores
