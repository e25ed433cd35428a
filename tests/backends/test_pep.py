"""PEP: thresholds shrink elements while tables train; those that are left are trained again."""

from __future__ import annotations

import pytest
import torch

from embcomp import PEP, BudgetError, Hash, load, save
from embcomp.backends.base import StageInputs
from embcomp.backends.pep import soft_threshold
from embcomp.testing import BackendCase
from embcomp.testing.cases import embed_ids, pooled
from embcomp.testing.check_data import batch_of, plain_tables
from embcomp.testing.planted import plant
from tests.helpers.learned_cases import Clicks, auc, fit, prune_and_train
from tests.helpers.long import long_but

TABLES = plain_tables(6, rows=(90, 60))
METHOD = PEP(serve_bytes=2_000, threshold_init=-3.0)


def thresholds_of(collection):
    return collection.combine.combines["pep"].thresholds.values


def test_elements_shrink_by_the_sigmoid_of_their_columns_threshold():
    collection = pooled(BackendCase(config=METHOD), TABLES).train()
    with torch.no_grad():
        thresholds_of(collection).copy_(torch.linspace(-6, -2, 12))
    row = collection.unpooled_rows.embedding_bags["t1"].weight[7, :6]
    limits = torch.linspace(-6, -2, 12)[6:].sigmoid()
    wanted = row.sign() * (row.abs() - limits).relu()
    found = collection(batch_of({"f0": [[]], "f1": [[7]]}))["f1"][0]
    torch.testing.assert_close(found, wanted)
    assert 0 < int((found == 0).sum()) < 6
    found.sum().backward()
    pull = thresholds_of(collection).grad
    slopes = -row.sign() * (row.abs() > limits) * limits * (1 - limits)
    torch.testing.assert_close(pull[6:], slopes)
    assert not pull[:6].any()


def test_thresholds_rise_by_the_climb_whatever_the_steps():
    for steps in (5, 40):
        method = PEP(serve_bytes=2_000, climb=3.0, threshold_learning_rate=0.5)
        collection = pooled(BackendCase(config=method), TABLES).train()
        collection.plan_steps(steps)
        optimizer = method.structure_optimizer(method.stages()[0], [thresholds_of(collection)])
        for _ in range(steps):
            collection(batch_of({"f0": [[1]], "f1": [[2]]}))
            optimizer.zero_grad()
            collection.penalty().backward()
            optimizer.step()
        torch.testing.assert_close(thresholds_of(collection).detach(), torch.full((12,), -5.0))


def test_what_is_left_are_the_largest_shrunk_elements_of_ids_that_occur():
    """With the weights that they began with."""
    collection = pooled(BackendCase(config=METHOD), TABLES)
    (state,) = collection.states()
    (first,) = pooled(BackendCase(config=METHOD), TABLES, seed=9).states()
    counts = {"t0": torch.arange(90) % 3, "t1": torch.ones(60, dtype=torch.int64)}
    past = StageInputs(before=state.form, initial=lambda: first.form, counts=counts)
    form = METHOD.start_stage(METHOD.stages()[1], state.tables, past)
    again = pooled(BackendCase(config=form.config), TABLES)
    (own,) = again.states()
    again.load_states([type(own)(tables=own.tables, form=form)])
    size = again.footprint.serve_bytes
    assert 2_000 - 5 < size <= 2_000
    sizes, found = embed_ids(collection, TABLES), embed_ids(again, TABLES)
    begun = {t: first.form.tensors[f"rows.{t}"] for t in ("t0", "t1")}
    assert not found["f0"][counts["t0"] == 0].any()
    sizes["f0"][counts["t0"] == 0] = 0
    joined = torch.cat([sizes["f0"], sizes["f1"]]).abs()
    kept = torch.cat([found["f0"], found["f1"]]) != 0
    assert joined[kept].min() >= joined[~kept].max()
    whole = torch.cat([begun["t0"], begun["t1"]])
    torch.testing.assert_close(torch.cat([found["f0"], found["f1"]])[kept], whole[kept])


def test_a_budget_below_the_pointers_is_refused():
    specs = pooled(BackendCase(config=METHOD), TABLES).plan.tables
    with pytest.raises(BudgetError, match=r"pep: 2 table.*smallest pep reaches is 613 bytes"):
        PEP().fit_budget(specs, 612)


def test_an_artefact_answers_exactly(tmp_path):
    collection = pooled(BackendCase(config=PEP(serve_bytes=10**6, threshold_init=-3.0)), TABLES)
    save(collection, tmp_path / "a")
    batch = batch_of({"f0": [[3, 80], []], "f1": [[11], [59, 1]]})
    found = load(tmp_path / "a")(batch).values()
    torch.testing.assert_close(found, collection(batch).values())


def test_nothing_shrinks_below_zero():
    rows = torch.tensor([[0.5, -0.5, 0.1, 0.0]])
    found = soft_threshold(rows, torch.tensor([0.2]))
    torch.testing.assert_close(found, torch.tensor([[0.3, -0.3, 0.0, 0.0]]))


@pytest.mark.parametrize("seed", long_but([0], range(3)))
def test_it_beats_hashing_in_equal_bytes_where_many_ids_mean_nothing(seed):
    planted = plant(seed=seed, useful_share=0.3)
    specs = Clicks(planted, Hash(num_buckets=1), 8).specs
    torch.manual_seed(0)
    hashed = Clicks(planted, Hash(collisionless=0).fit_budget(specs, "25%"), 8)
    fit(hashed, planted, epochs=3)
    most = hashed.tables.footprint.serve_bytes
    model = prune_and_train(planted, PEP(serve_bytes=most), 8, epochs=(3, 3))
    score, other = auc(model, planted), auc(hashed, planted)
    assert model.tables.footprint.serve_bytes <= most
    assert score > other + 0.015
