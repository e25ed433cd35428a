"""CCE: ids that training finds alike come to share rows."""

from __future__ import annotations

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp import CCE, Hash
from embcomp.backends.base import StageInputs
from embcomp.collection.group_states import GroupState
from embcomp.testing.cases import BackendCase, embed_ids, pooled
from embcomp.testing.check_data import batch_of, plain_tables
from embcomp.testing.planted import Planted
from tests.helpers.learned_cases import TRAIN, Clicks, auc, fit
from tests.helpers.long import long_but

TABLES = plain_tables(6, rows=(90, 60))
METHOD = CCE(num_buckets=8, subvector_dim=4, collisionless=0)
STAGES = METHOD.stages()


def clustered(collection, counts=None):
    """The state in which the next stage begins."""
    (each,) = collection.states()
    past = StageInputs(before=each.form, initial=lambda: each.form, counts=counts or {})
    return each.form.config.start_stage(STAGES[1], each.tables, past)


def loaded(state):
    """A collection in this state."""
    collection = pooled(BackendCase(config=state.config), TABLES, seed=5)
    (own,) = collection.states()
    collection.load_states([GroupState(tables=own.tables, form=state)])
    return collection


def test_a_part_is_the_sum_of_a_coded_and_a_hashed_row():
    collection = pooled(BackendCase(config=METHOD), TABLES)
    weights = {name: bag.weight for name, bag in collection.rows.embedding_bags.items()}
    found = embed_ids(collection, TABLES)["f0"]
    assert weights["t0"].shape == (2 * 8 * 2, 4)
    routed, _, _ = collection.route(batch_of({"f0": [[17]], "f1": [[]]}))
    pairs = [bag.values().tolist() for key, bag in routed.to_dict().items() if "/f0#" in key]
    assert [(0 <= a < 8, 8 <= b < 16) for a, b in pairs[:1]] == [(True, True)]
    assert [(16 <= a < 24, 24 <= b < 32) for a, b in pairs[1:]] == [(True, True)]
    parts = [weights["t0"][a] + weights["t0"][b] for a, b in pairs]
    torch.testing.assert_close(found[17], torch.cat(parts)[:6])


def test_clustering_keeps_what_ids_look_up_as_well_as_rows_can():
    """Ids of 8 kinds and 8 rows: nothing is left for the hashed rows, and nothing is lost."""
    collection = pooled(BackendCase(config=METHOD), TABLES)
    weights = next(iter(collection.rows.embedding_bags["t0"].parameters()))
    with torch.no_grad():
        for part in range(2):  # what is looked up are the coded rows alone
            weights[16 * part + 8 : 16 * part + 16] = 0
    before = embed_ids(collection, TABLES)
    state = clustered(collection)
    assert state.config == CCE(num_buckets=8, subvector_dim=4, collisionless=0, round=1)
    again = loaded(state)
    after = embed_ids(again, TABLES)
    torch.testing.assert_close(after["f0"], before["f0"], rtol=1e-5, atol=1e-6)
    rows = again.state_dict()["rows.embedding_bags.t0.weight"]
    assert rows[8:16].abs().max() < 1e-6
    error = (after["f1"] - before["f1"]).square().sum() / before["f1"].square().sum()
    assert error < 0.5  # of 64 sums a part, from 16 rows


def test_bytes_count_the_map_and_a_budget_has_it_as_its_floor():
    specs = list(pooled(BackendCase(config=METHOD), TABLES).plan.tables)
    codes = -(-90 * 2 * 3 // 8) + -(-60 * 2 * 3 // 8)
    assert METHOD.footprint(specs).serve_bytes == 2 * (2 * 8 * 2) * 4 * 4 + codes
    method = CCE(subvector_dim=4, collisionless=0).fit_budget(specs, "60%")
    assert method.ratio is not None and method.footprint(specs).serve_bytes <= 0.6 * 150 * 6 * 4


@pytest.mark.parametrize("counted", [False, True])
def test_ids_that_never_occur_share_codes(counted):
    collection = pooled(BackendCase(config=METHOD), TABLES)
    counts = {"t0": torch.arange(90).flip(0), "t1": torch.arange(60).flip(0)} if counted else {}
    if counted:
        counts["t0"][40:] = 0
    state = clustered(collection, counts)
    again = loaded(state)
    routed, _, _ = again.route(_all_ids())
    coded = routed.values().view(-1, 2)[:90, 0]
    assert (len(coded[40:].unique()) == 1) == counted


def _all_ids():
    lengths = torch.cat([torch.ones(90), torch.zeros(90)]).int()
    return KeyedJaggedTensor(keys=["f0", "f1"], values=torch.arange(90), lengths=lengths)


def kinds(seed, rows=15_000, count=600, groups=12):
    """Ids of a few kinds, which are what moves the label."""
    random = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, count + 1, dtype=torch.float64)
    ids, score = [], torch.zeros(rows)
    for _ in range(4):
        drawn = torch.multinomial(weights, rows, replacement=True, generator=random)
        effect = 2 * torch.randn(groups, generator=random)
        score += effect[torch.randint(0, groups, (count,), generator=random)[drawn]]
        ids.append(drawn)
    labels = (torch.rand(rows, generator=random) < torch.sigmoid(score)).float()
    useful = torch.ones(count, dtype=torch.bool)
    return Planted(ids=torch.stack(ids, dim=1), labels=labels, useful=(useful,) * 4)


def trained(planted, method, seed, epochs):
    """Its life: a pass, clusterings and passes after them."""
    torch.manual_seed(seed)
    model = Clicks(planted, method, 8)
    fit(model, planted, epochs=epochs if len(method.stages()) == 1 else 1)
    for stage in method.stages()[1:]:
        past = StageInputs(before=model.form, initial=lambda: None, counts=planted.counts(TRAIN))
        form = model.form.config.start_stage(stage, model.specs, past)
        after = Clicks(planted, form.config, 8)
        after.load(form)
        after.linear.load_state_dict(model.linear.state_dict())
        model = after
        fit(model, planted, epochs=1)
    return auc(model, planted), model.tables.footprint.serve_bytes


@pytest.mark.parametrize("seed", long_but([0], range(3)))
def test_it_beats_hashing_in_equal_bytes_where_ids_are_of_few_kinds(seed):
    planted = kinds(seed)
    specs = Clicks(planted, Hash(num_buckets=1), 8).specs
    cce = CCE(subvector_dim=4, collisionless=0).fit_budget(specs, "12%")
    hashed = Hash(collisionless=0).fit_budget(specs, "12%")
    score, size = trained(planted, cce, seed, 3)
    other, most = trained(planted, hashed, seed, 3)
    assert size <= most * 1.01
    assert score > other + 0.01
