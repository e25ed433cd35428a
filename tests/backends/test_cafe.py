"""CAFE: ids that matter get rows of their own while training goes on, and lose them to better ones."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from embcomp import Cafe, ConfigError, Hash, load, save
from embcomp.backends.cafe.hot_sketch import WAYS, HotSketch
from embcomp.layers.held_pieces import _sharded_pieces
from embcomp.serving.exported_program import Program, export_program, program_inputs
from embcomp.testing.cases import BackendCase, pooled
from embcomp.testing.check_data import batch_of, plain_tables, random_batch
from embcomp.testing.planted import Planted, plant
from tests.helpers.learned_cases import TRAIN, Clicks, auc, fit, shuffled
from tests.helpers.long import long_but

TABLES = plain_tables(8, rows=(1000,))
METHOD = Cafe(num_buckets=40, hot_share=0.2, threshold=2.0, collisionless=0)
SHARED = 32  # of the 40 rows


def sketch_of(cells=8, **settings):
    settings = {"threshold": 2.0, "margin": 1.25, "decay": 1.0, "periods": [100]} | settings
    sketch = HotSketch([("t", cells)], adapts=True, **settings)
    sketch.ensure_filled()
    return sketch


def add(sketch, ids, scores, buckets=None):
    ids = torch.tensor(ids)
    buckets = torch.zeros_like(ids) if buckets is None else torch.tensor(buckets)
    return sketch.add(ids, ids, buckets, torch.zeros_like(ids), torch.tensor(scores))


def step(collection, ids, pull=1.0):
    """One step of SGD in which each id is pulled as far as is said."""
    optimizer = torch.optim.SGD(collection.parameters(), lr=0.1)
    optimizer.zero_grad()
    out = collection.train()(batch_of({"f0": [[each] for each in ids]}))["f0"]
    (out.sum(1) * torch.as_tensor(pull)).sum().backward()
    optimizer.step()


def rows_of(collection, ids):
    _, rows, _ = collection.eval().route(batch_of({"f0": [[each] for each in ids]}))
    return rows.values().tolist()


def hot_ids(collection):
    ids = collection.state_dict()["route.routes.cafe.sketch.hot@t0"]
    return set(ids[ids >= 0].tolist())


def test_scores_add_up_and_an_id_rises_when_it_is_seen_again():
    sketch = sketch_of()
    first = add(sketch, [5, 5, 9], [1.0, 2.0, 1.5])
    assert not first.rises.any()  # 5 has come in with 3, and 9 had to wait: one an each step
    second = add(sketch, [9, 5], [1.0, 0.5])
    assert second.rises.tolist() == [True, True] and second.ids.tolist() == [5, 5]
    assert sketch.hot[:WAYS].tolist().count(5) == 1 and sketch.hot_scores.max() == 3.5
    is_hot, cell = sketch.cell(torch.tensor([5, 9, -1]), torch.zeros(3, dtype=torch.int64))
    assert is_hot.tolist() == [True, False, False] and sketch.hot[cell[0]] == 5
    sketch.add(*(torch.tensor([n]) for n in (2**31, 2**31, 0, 0)), torch.tensor([9.0]))
    assert set(sketch.waiting[sketch.waiting >= 0].tolist()) == {9}  # too large an id for 32 bits


def test_a_full_bucket_gives_a_row_up_to_a_much_better_id_alone():
    sketch = sketch_of(cells=WAYS)
    for id_ in range(WAYS):
        for _ in range(2):
            add(sketch, [id_], [10.0 + id_])
    assert sorted(sketch.hot.tolist()) == [0, 1, 2, 3]
    add(sketch, [7], [23.0])
    assert not add(sketch, [7], [1.0]).rises.any()  # 24 is less than 1.25 times 20
    risen = add(sketch, [7], [2.0])
    assert risen.rises.all() and sorted(sketch.hot.tolist()) == [1, 2, 3, 7]
    assert 0 in sketch.waiting.tolist()  # and goes on waiting with its score


def test_new_scores_grow_as_old_ones_would_decay():
    steps = 100  # more than one division of all scores
    sketch = sketch_of(decay=0.5, periods=[10])
    plain = 0.0
    for _ in range(steps):
        add(sketch, [5], [1.0])
        plain += 1
        sketch.age([10])
        plain *= 0.5
    held = torch.cat(
        [sketch.hot_scores[sketch.hot == 5], sketch.waiting_scores[sketch.waiting == 5]]
    )
    assert float(held / sketch.growth) == pytest.approx(plain, rel=1e-5)
    assert float(sketch.growth) < 2**60


def test_what_rises_begins_with_a_copy_of_its_shared_row_and_goes_back_to_that():
    torch.manual_seed(0)
    collection = pooled(BackendCase(config=METHOD), TABLES)
    weight = next(collection.unpooled_rows.parameters())
    (shared,) = rows_of(collection, [7])
    assert shared >= 40 - SHARED
    for _ in range(2):
        step(collection, [7, 7, 7, 400], pull=[3.0, 3.0, 3.0, 0.1])
    before = weight[shared].clone()
    assert hot_ids(collection) == {7}  # reading the state has settled what the last step left
    (own,) = rows_of(collection, [7])
    assert own < 40 - SHARED
    torch.testing.assert_close(weight[own], before)
    step(collection, [7])
    assert torch.equal(weight[shared], before) and not torch.equal(weight[own], before)


def test_state_and_artefact_have_what_is_hot(tmp_path):
    torch.manual_seed(0)
    collection = pooled(BackendCase(config=METHOD), TABLES)
    for n in range(4):
        step(collection, [7, 7, 8, 8, 50 + n])
    batch = random_batch(TABLES, seed=1)
    again = pooled(BackendCase(config=METHOD), TABLES, seed=3)
    again.load_state_dict(copy.deepcopy(collection.state_dict()))
    for both in (collection, again):
        step(both, [7, 8, 9, 10])
    wanted = collection.eval()(batch).values()
    torch.testing.assert_close(again.eval()(batch).values(), wanted, rtol=0, atol=0)
    save(collection, tmp_path / "a")
    assert 7 in hot_ids(collection)
    torch.testing.assert_close(load(tmp_path / "a")(batch).values(), collection(batch).values())
    program = Program(load(tmp_path / "a", rows="torch"), bags=True)
    found = export_program(program).module()(program_inputs(program, torch.zeros(6, 0), batch))
    torch.testing.assert_close(found["f0"], collection(batch)["f0"])
    assert collection.footprint.serve_bytes == 40 * 8 * 4 + 8 * 4


def test_rows_behind_a_cache_are_refused_by_name():
    plan = {"t0": SimpleNamespace(compute_kernel="fused_uvm_caching")}
    with pytest.raises(
        ConfigError, match=r"cafe: rows of table 't0' lie behind a cache \(fused_uvm"
    ):
        _sharded_pieces(SimpleNamespace(module_sharding_plan=plan), "t0", "cafe")


@pytest.mark.parametrize("seed", long_but([0], range(3)))
def test_it_beats_hashing_at_one_percent_where_few_ids_are_most_of_the_look_ups(seed):
    planted, scores = shuffled(plant(num_values=(5000,) * 4, seed=seed)), {}
    specs = Clicks(planted, Hash(num_buckets=1), 8).specs
    for method in (Hash(collisionless=0), Cafe(collisionless=0)):
        torch.manual_seed(seed)
        model = Clicks(planted, method.fit_budget(specs, "1%"), 8)
        fit(model, planted, epochs=2)
        assert model.tables.footprint.serve_bytes <= 4 * 5000 * 8 * 4 // 100
        scores[method.name] = auc(model, planted)
    assert scores["cafe"] > scores["hash"] + 0.02


def test_it_follows_what_becomes_frequent_later():
    planted = shuffled(plant(num_values=(2000,) * 2, seed=1))
    later = (planted.ids + 700) % 2000  # others are the frequent ones from the middle on
    half = (TRAIN.stop - TRAIN.start) // 2
    ids = torch.where(torch.arange(len(later))[:, None] < half, planted.ids, later)
    moved = Planted(ids=ids, labels=planted.labels, useful=planted.useful)
    torch.manual_seed(0)
    model = Clicks(moved, Cafe(num_buckets=60, decay=0.5, collisionless=0), 8)
    shares = []
    for rows in (slice(0, half), slice(half, TRAIN.stop)):
        fit(model, moved, epochs=1, rows=rows)
        counts = torch.bincount(moved.ids[rows, 0], minlength=2000)
        state = model.tables.state_dict()["route.routes.cafe.sketch.hot@t0"]
        shares.append(float(counts[state[state >= 0].long()].sum() / counts.sum()))
    assert min(shares) > 0.3
