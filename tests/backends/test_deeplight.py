"""DeepLight: ever more of the smallest elements are set to zero while training goes on."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from embcomp import DeepLight, Hash
from embcomp.testing import BackendCase
from embcomp.testing.cases import pooled
from embcomp.testing.check_data import batch_of, plain_tables, random_batch
from embcomp.testing.planted import plant
from embcomp.testing.sharded import (
    Setup,
    expect_equal_weights,
    reference_optimizer,
    shard,
    train_step,
)
from tests.helpers.learned_cases import Clicks, auc, fit, prune_and_train
from tests.helpers.long import long_but

TABLES = plain_tables(6, rows=(90, 60))
METHOD = DeepLight(serve_bytes=2_000, every=2)
ELEMENTS = 150 * 6


def rows_of(collection):
    bags = collection.unpooled_rows.embedding_bags
    return torch.cat([bags[name].weight[:, :6] for name in ("t0", "t1")])


def step(collection, rate=0.0):
    loss = collection(random_batch(TABLES, seed=1)).values().sum()
    collection.zero_grad()
    loss.backward()
    with torch.no_grad():
        for weight in collection.parameters():
            weight.sub_(weight.grad, alpha=rate)


def test_the_budget_says_how_many_elements_become_zero_and_the_steps_when():
    specs = pooled(BackendCase(config=METHOD), TABLES).plan.tables
    room = 1 + (2_000 - (152 * 4 + 5)) // 5
    assert METHOD.zero_share(specs) == pytest.approx(1 - room / ELEMENTS)
    assert DeepLight(serve_bytes=10**9).zero_share(specs) == 0
    route = pooled(BackendCase(config=METHOD), TABLES).route.routes["deeplight"]
    shares = [route.share_after(steps, 300) / METHOD.zero_share(specs) for steps in (0, 100, 300)]
    assert shares == pytest.approx([0, 0.9, 0.999])


def test_the_smallest_elements_become_zero_every_so_many_steps():
    collection = pooled(BackendCase(config=METHOD), TABLES).train()
    collection.plan_steps(10)
    before = rows_of(collection).detach().clone()
    route = collection.route.routes["deeplight"]
    specs = collection.plan.tables
    for steps in range(1, 6):
        step(collection)
        collection.settle()
        now = rows_of(collection).detach()
        zeros = int((now == 0).sum())
        wanted = METHOD.zero_share(specs) * (1 - 1e-3 ** ((steps - steps % 2) / 10)) * ELEMENTS
        assert wanted - 25 < zeros <= wanted  # sizes are told apart to seven bits
        assert torch.equal(now[now != 0], before[now != 0])
        if zeros:
            assert before[now == 0].abs().max() < before[now != 0].abs().min()
    assert int(route.steps.count) == 5
    assert int(collection.state_dict()["route.routes.deeplight.steps.count"]) == 5


def test_a_zero_may_grow_back():
    collection = pooled(BackendCase(config=METHOD), TABLES).train()
    collection.plan_steps(1)
    step(collection)
    step(collection)
    collection.settle()
    gone = rows_of(collection).detach() == 0
    assert gone.float().mean() > 0.6
    step(collection, rate=1.0)  # an odd step: nothing is pruned behind it
    collection.settle()
    assert bool((rows_of(collection)[gone] != 0).any())


def test_evaluation_counts_no_step_and_prunes_nothing():
    collection = pooled(BackendCase(config=METHOD), TABLES)
    for _ in range(3):
        collection(batch_of({"f0": [[1]], "f1": [[2]]}))
    assert not int(collection.state_dict()["route.routes.deeplight.steps.count"])
    assert bool((rows_of(collection) != 0).all())


def zeros_on_ranks(setup):
    """Trains sharded and in one process, and counts what is zero."""
    reference = setup.model(seed=1)
    weights = copy.deepcopy(reference.state_dict())
    sharded, optimizer = shard(setup, setup.model(seed=7 + dist.get_rank()), weights=weights)
    whole = reference_optimizer(setup, reference)
    for number in range(4):
        train_step(sharded, optimizer, setup.batch(number, dist.get_rank()))
        train_step(reference, whole, setup.global_batch(number))
    sharded.module.tables.settle()
    found = reference.state_dict()
    expect_equal_weights(sharded.state_dict(), found)
    return sum(int((w == 0).sum()) for name, w in found.items() if "embedding_bags" in name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", long_but([2], [2, 4]))
def test_ranks_together_prune_what_one_process_does(workers, ranks):
    # Nearly all of the schedule within the first of the 5,000 steps that are taken for granted.
    method = DeepLight(serve_bytes=4_000, every=1, deviation=1e-300)
    found = workers.run(ranks, zeros_on_ranks, Setup(plan=method, sharding="mixed"))
    assert len(set(found)) == 1
    assert found[0] > 500


@pytest.mark.parametrize("seed", long_but([0], range(3)))
def test_it_beats_hashing_in_equal_bytes_where_many_ids_mean_nothing(seed):
    planted = plant(seed=seed, useful_share=0.3)
    specs = Clicks(planted, Hash(num_buckets=1), 8).specs
    torch.manual_seed(0)
    hashed = Clicks(planted, Hash(collisionless=0).fit_budget(specs, "25%"), 8)
    fit(hashed, planted, epochs=3)
    most = hashed.tables.footprint.serve_bytes
    model = prune_and_train(
        planted, DeepLight(serve_bytes=most), 8, epochs=(3, 1), rates=(0.1, 0.01)
    )
    score, other = auc(model, planted), auc(hashed, planted)
    assert model.tables.footprint.serve_bytes <= most
    assert score > other + 0.015
