"""Adapt: ids of large gradients get the private rows at each choice; the others are hashed, or have none."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from embcomp import Adapt, Hash, load, save
from embcomp.backends.base import FollowInputs, MethodState
from embcomp.backends.private_ids import PrivateIds, PrivateTable
from embcomp.layers import block_work, row_sources
from embcomp.layers.followed_ids import FollowedIds
from embcomp.layers.row_sources import as_rows
from embcomp.serving.exported_program import Program, export_program, program_inputs
from embcomp.tables.specs import TableSpec
from embcomp.testing.cases import BackendCase, pooled
from embcomp.testing.check_data import batch_of, plain_tables, random_batch
from embcomp.testing.planted import Planted, plant
from tests.helpers.handover_cases import BLOCK, CountedBytes
from tests.helpers.learned_cases import TRAIN, Clicks, auc, fit, shuffled
from tests.helpers.long import long_but

TABLES = plain_tables(8, rows=(1000,))
METHOD = Adapt(num_buckets=10, private_share=0.4, every=2, collisionless=0)
PRIVATE = 4  # of the 10 rows
SCORES = "route.private.scores"
ZERO = Adapt(num_buckets=4, rare="zero", every=2, collisionless=0)


def private_ids(sizes=((20, 3), (10, 0), (8, 2)), adapts=True):
    tables = [PrivateTable(name=f"t{n}", ids=i, rows=r) for n, (i, r) in enumerate(sizes)]
    found = PrivateIds(tables, adapts=adapts)
    found.ensure_filled()
    return found


def add(private, ids, scores, place=0):
    ids = torch.tensor(ids)
    private.add(ids, torch.full_like(ids, place), torch.tensor(scores))


def step(collection, ids, pull=1.0):
    """One step of SGD in which each id is pulled as far as is said."""
    optimizer = torch.optim.SGD(collection.parameters(), lr=0.1)
    optimizer.zero_grad()
    out = collection.train()(batch_of({"f0": [[each] for each in ids]}))["f0"]
    (out.sum(1) * torch.as_tensor(pull)).sum().backward()
    optimizer.step()


def rows_of(collection, ids):
    route = collection.eval().route.routes["adapt"]
    return route(batch_of({"f0": [[each] for each in ids]})).values().tolist()


def owned(collection):
    return collection.state_dict()["route.routes.adapt.private.ids@t0"].tolist()


def test_a_step_whose_gradients_are_no_numbers_counts_nothing():
    torch.manual_seed(0)
    collection = pooled(BackendCase(config=METHOD), TABLES)
    step(collection, [500, 501], pull=0.0)
    for bad in (torch.nan, torch.inf):
        out = collection.train()(batch_of({"f0": [[500], [501], [502], [503]]}))["f0"]
        (out.sum(1) * bad).sum().backward()  # and no step, as a gradient scaler has it
    for _ in range(6):
        step(collection, [700, 701, 702, 703])
    step(collection, [0], pull=0.0)
    assert owned(collection) == [700, 701, 702, 703]
    scores = collection.state_dict()["route.routes.adapt.private.scores@t0"]
    assert bool(scores.isfinite().all())


def test_gradients_of_all_forward_passes_count_whenever_they_come():
    torch.manual_seed(0)
    collection = pooled(BackendCase(config=METHOD), TABLES).train()
    optimizer = torch.optim.SGD(collection.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        one = collection(batch_of({"f0": [[700]]}))["f0"]
        other = collection(batch_of({"f0": [[800]]}))["f0"]
        (one.sum() + other.sum()).backward()
        optimizer.step()
    step(collection, [0], pull=0.0)
    found = collection.state_dict()
    scores = found["route.routes.adapt.private.scores@t0"]
    assert float(scores[700]) == pytest.approx(float(scores[800])) and float(scores[700]) > 1
    assert found["route.routes.adapt.steps.count@t0"].tolist() == [4]  # the last step with them
    assert {700, 800} <= set(owned(collection))


def test_the_first_ids_have_the_rows_until_others_matter_more():
    private = private_ids()
    assert private.ids.tolist() == [0, 1, 2, 0, 1]
    assert private.best(0, 1.0).tolist() == [0, 1, 2]  # where nothing matters yet
    add(private, [7, 7, 0, 1, 25, -3, 2**40], [1.0, 2.0, 5.0, 1.0, 9.0, 9.0, 9.0])
    assert private.best(0, 1.0).tolist() == [0, 1, 7]  # and ids that are none do not count
    add(private, [9, 2], [1.2, 1.0])
    assert private.best(0, 1.0).tolist() == [0, 7, 9]
    assert 9 not in private.best(0, 1.25).tolist()  # 1.2 is within the margin of 1
    private.fade(0.5)
    assert float(private.scores[7]) == 1.5
    assert private.best(1, 1.0).tolist() == [0, 1]  # of another table


def test_those_that_stay_keep_their_rows_and_newcomers_take_what_is_left():
    private = private_ids()
    rows, new = private.give_rows(0, torch.tensor([1, 7, 9]))
    assert new.tolist() == [False, True, True]
    assert rows[0] == 1 and sorted(rows.tolist()) == [0, 1, 2]
    rows, new = private.give_rows(0, torch.tensor([0, 7, 19]))
    assert new.tolist() == [True, False, True] and sorted(rows.tolist()) == [0, 1, 2]
    assert private.ids.tolist() == [0, 7, 19, 0, 1]  # and the other table's are as they were


@pytest.mark.parametrize("adapts", [True, False])
def test_ids_are_found_by_sorting_and_by_bisection_alike(adapts, monkeypatch):
    private = private_ids(((900, 37), (40, 0), (70, 1), (2000, 300)), adapts)
    random = torch.Generator().manual_seed(0)
    for part, (most, rows) in zip((slice(0, 37), slice(38, 338)), ((900, 37), (2000, 300))):
        private.ids[part] = torch.randperm(most, generator=random)[:rows].sort().values.int()
    ids = torch.arange(-5, 2005).repeat(4, 1)
    ids = torch.cat([ids, torch.tensor([[2**31, 2**32, 2**32 + 1, -(2**63), 2**63 - 1]] * 4)], 1)
    places = torch.tensor([[0], [-1], [1], [2]])
    found = private.rows_of(ids, places)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(private.rows_of(ids, places), found)
    wanted = torch.full_like(ids, -1)
    for line, part in ((0, slice(0, 37)), (2, slice(37, 38)), (3, slice(38, 338))):
        own = private.ids[part].long()
        wanted[line, own + 5] = torch.arange(len(own))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("method", [METHOD, ZERO], ids=["hash", "zero"])
def test_a_new_owner_begins_with_what_it_was_answered(method):
    torch.manual_seed(0)
    collection = pooled(BackendCase(config=method), TABLES)
    before = collection.eval()(batch_of({"f0": [[700], [0]]}))["f0"].clone()
    assert rows_of(collection, [0, 3, 4])[:2] == [0, 3]
    step(collection, [700, 0, 1, 2], pull=[0.3, 0.2, 0.2, 0.2])
    with torch.no_grad():
        before = collection.eval()(batch_of({"f0": [[700]]}))["f0"]
    assert bool(before.any()) == (method.rare == "hash")
    step(collection, [0, 1, 2, 0], pull=0.0)  # moves nothing, and is the second
    assert owned(collection) == [0, 1, 2, 700]  # reading the state has settled what it left
    (own,) = rows_of(collection, [700])
    assert own == 3
    after = collection.eval()(batch_of({"f0": [[700]]}))["f0"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    gone = rows_of(collection, [3])[0]
    assert gone == -1 if method.rare == "zero" else gone >= PRIVATE
    step(collection, [700])
    assert not torch.equal(collection.eval()(batch_of({"f0": [[700]]}))["f0"], after)


def test_an_owner_keeps_its_row_within_the_margin():
    torch.manual_seed(0)
    collection = pooled(BackendCase(config=METHOD), TABLES)
    for _ in range(2):
        step(collection, [0, 1, 2, 3, 700], pull=[1.0, 1.0, 1.0, 1.0, 1.2])
    assert owned(collection) == [0, 1, 2, 3]
    for _ in range(2):
        step(collection, [0, 1, 2, 3, 700], pull=[1.0, 1.0, 1.0, 1.0, 2.0])
    assert 700 in owned(collection)


@pytest.mark.parametrize("method", [METHOD, ZERO], ids=["hash", "zero"])
def test_state_and_artefact_have_what_is_private(method, tmp_path):
    torch.manual_seed(0)
    collection = pooled(BackendCase(config=method), TABLES)
    for n in range(5):
        step(collection, [1, 2, 700, 50 + n])
    batch = random_batch(TABLES, seed=1)
    again = pooled(BackendCase(config=method), TABLES, seed=3)
    again.load_state_dict(copy.deepcopy(collection.state_dict()))
    for both in (collection, again):  # a choice is due in the middle
        for _ in range(3):
            step(both, [7, 1, 2, 700], pull=[5.0, 1.0, 1.0, 1.0])
    wanted = collection.eval()(batch).values()
    torch.testing.assert_close(again.eval()(batch).values(), wanted, rtol=0, atol=0)
    assert owned(again) == owned(collection) and 7 in owned(collection)
    assert collection.state_dict()["route.routes.adapt.private.rows@t0"].tolist() != [0, 1, 2, 3]
    assert owned(collection) != [0, 1, 2, 3]
    save(collection, tmp_path / "a")
    probe = batch_of({"f0": [[each] for each in (*owned(collection), 3, 999)]})
    for each in (batch, probe):
        found = load(tmp_path / "a")(each).values()
        torch.testing.assert_close(found, collection.eval()(each).values())
    program = Program(load(tmp_path / "a", rows="torch"), bags=True)
    found = export_program(program).module()(program_inputs(program, torch.zeros(6, 0), batch))
    torch.testing.assert_close(found["f0"], collection(batch)["f0"])
    rows = 10 if method is METHOD else 4
    assert collection.footprint.serve_bytes == rows * 8 * 4 + PRIVATE * 4


def test_what_is_pruned_is_known():
    collection = pooled(BackendCase(config=ZERO), TABLES)
    specs = [spec for group in collection.groups for spec in group.tables]
    state = MethodState(config=ZERO, tensors={"route.private.ids": torch.tensor([1, 5, 9, 998])})
    pruned = ZERO.pruned_ids(specs, state)["t0"]
    assert torch.nonzero(~pruned.whole())[:, 0].tolist() == [1, 5, 9, 998]
    assert (~pruned.read(5, 10)).tolist() == [True, False, False, False, True]
    assert METHOD.pruned_ids(specs, state) == {}


def test_private_ids_and_their_rows_are_read_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(block_work, "BLOCK_BYTES", 1)
    monkeypatch.setattr(row_sources, "_AT_ONCE", BLOCK)
    monkeypatch.setattr(CountedBytes, "most", 0)
    random = torch.Generator().manual_seed(1)
    ids = torch.randperm(5000, generator=random)[:3000].sort().values.int()
    rows = torch.randn(3000, 8, generator=random)
    order = torch.randperm(3000, generator=random).int()
    table = TableSpec(name="t0", num_embeddings=5000, embedding_dim=8, feature_names=("f0",))
    tensors = {"rows.t0": rows, "route.private.ids": ids, "route.private.rows": order}
    method = replace(ZERO, num_buckets=3000)
    form = MethodState.of(method, {name: CountedBytes(each) for name, each in tensors.items()})
    assert torch.equal(method.compact([table], form).rows("t0").whole(), rows[order.long()])
    pruned = method.pruned_ids([table], form)["t0"]
    parts = [pruned.read(start, min(start + 256, 5000)) for start in range(0, 5000, 256)]
    assert (~torch.cat(parts)).nonzero()[:, 0].tolist() == ids.tolist()
    assert 0 < CountedBytes.most <= BLOCK


def test_importances_follow_ids_and_new_ones_have_none():
    then, now = (
        [TableSpec(name="t0", num_embeddings=n, embedding_dim=8, feature_names=("f0",))]
        for n in (5, 7)
    )
    method = Adapt(num_buckets=2, private_share=0.5, collisionless=0)
    state = MethodState(config=method, tensors={SCORES: torch.arange(5.0)})
    fresh = torch.tensor([False, False, False, True, False, True, True])
    ids = FollowedIds(
        before=as_rows(torch.where(fresh, -1, torch.arange(7))),
        fresh=as_rows(fresh),
        has_value=as_rows(~fresh),
        counts=as_rows(torch.ones(5, dtype=torch.float64)),
    )
    past = FollowInputs(tables=now, before=state, tables_before=then, ids={"t0": ids})
    for long in (state, replace(state, tensors={}, sources={SCORES: as_rows(torch.arange(5.0))})):
        found = method.follow_ids(replace(past, before=long))
        assert found.tensors[SCORES].whole().tolist() == [0, 1, 2, 0, 4, 0, 0]


@pytest.mark.parametrize("seed", long_but([0], range(3)))
def test_it_beats_hashing_at_one_percent_where_few_ids_are_most_of_the_look_ups(seed):
    planted, scores = shuffled(plant(num_values=(5000,) * 4, seed=seed)), {}
    specs = Clicks(planted, Hash(num_buckets=1), 8).specs
    methods = {
        "hash": Hash(collisionless=0),
        "adapt": Adapt(every=10, collisionless=0),
        "zero": Adapt(rare="zero", every=10, collisionless=0),
    }
    for name, method in methods.items():
        torch.manual_seed(seed)
        model = Clicks(planted, method.fit_budget(specs, "1%"), 8)
        fit(model, planted, epochs=2)
        assert model.tables.footprint.serve_bytes <= 4 * 5000 * 8 * 4 // 100
        scores[name] = auc(model, planted)
    assert scores["adapt"] > scores["hash"] + 0.02
    assert scores["zero"] > scores["hash"] + 0.02


def test_it_follows_what_becomes_frequent_later():
    planted = shuffled(plant(num_values=(2000,) * 2, seed=1))
    later = (planted.ids + 700) % 2000  # others are the frequent ones from the middle on
    half = (TRAIN.stop - TRAIN.start) // 2
    ids = torch.where(torch.arange(len(later))[:, None] < half, planted.ids, later)
    moved = Planted(ids=ids, labels=planted.labels, useful=planted.useful)
    torch.manual_seed(0)
    model = Clicks(moved, Adapt(num_buckets=60, every=2, decay=0.8, collisionless=0), 8)
    shares = []
    for rows in (slice(0, half), slice(half, TRAIN.stop)):
        fit(model, moved, epochs=1, rows=rows)
        counts = torch.bincount(moved.ids[rows, 0], minlength=2000)
        state = model.tables.state_dict()["route.routes.adapt.private.ids@t0"]
        shares.append(float(counts[state.long()].sum() / counts.sum()))
    assert min(shares) > 0.3
