"""Checkpoints move between numbers of ranks and splits, and training goes on as if never stopped."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from embcomp.testing.sharded import (
    Setup,
    expect_equal_weights,
    mean_over_ranks,
    reference_optimizer,
    shard,
    train_step,
)
from tests.collection.test_sharding import ALL_METHODS
from tests.helpers.backends_under_test import CASES

pytestmark = pytest.mark.slow

BEFORE, AFTER = 2, 2
ROWS = 20  # in a step, over all ranks


def state_of(sharded, optimizer):
    return {"model": sharded.state_dict(), "optim": optimizer.state_dict()}


def step_of(setup, step):
    """This rank's rows of a step that is the same for every world size."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    whole = setup.batch(step, 0)
    own = range(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    bags = {
        key: (torch.split(jagged.values(), jagged.lengths().tolist()), jagged.lengths())
        for key, jagged in whole.sparse.to_dict().items()
    }
    whole.sparse = type(whole.sparse)(
        keys=list(bags),
        values=torch.cat([values[row] for values, _ in bags.values() for row in own]),
        lengths=torch.cat([lengths[list(own)] for _, lengths in bags.values()]),
    )
    whole.labels, whole.dense = whole.labels[list(own)], whole.dense[list(own)]
    return whole


def setup_of(plan, sharding, pooled):
    return Setup(
        plan=plan,
        sharding=sharding,
        pooled=pooled,
        dims=(16, 8, 10) if pooled else (10, 10, 10),
        batch_size=ROWS,
    )


def train_and_save(setup, folder):
    """Train, save, and train on; the losses after the checkpoint."""
    quiet()
    weights = setup.model(seed=1).state_dict()
    sharded, optimizer = shard(setup, setup.model(seed=2), weights=weights)
    for step in range(BEFORE):
        train_step(sharded, optimizer, step_of(setup, step))
    sharded.module.tables.settle()
    dcp.save(state_of(sharded, optimizer), checkpoint_id=folder)
    return train_on(setup, sharded, optimizer)


def train_on(setup, sharded, optimizer):
    return [
        mean_over_ranks(train_step(sharded, optimizer, step_of(setup, BEFORE + step)))
        for step in range(AFTER)
    ]


def load_and_train_on(setup, folder, wanted):
    quiet()
    sharded, optimizer = shard(setup, setup.model(seed=3 + dist.get_rank()))
    dict(optimizer.optimizers)["dense"].init_state()
    state = state_of(sharded, optimizer)
    dcp.load(state, checkpoint_id=folder)
    sharded.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optim"])
    found = train_on(setup, sharded, optimizer)
    assert found == pytest.approx(wanted, abs=2e-6), f"{setup}: {found}, uninterrupted {wanted}"


def quiet():
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


def train_without_ranks(setup):
    """The same steps in one process: losses after the checkpoint, and weights at it."""
    model = setup.model(seed=1)
    optimizer = reference_optimizer(setup, model)
    for step in range(BEFORE):
        train_step(model, optimizer, setup.batch(step, 0))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return weights, [
        train_step(model, optimizer, setup.batch(BEFORE + step, 0)) for step in range(AFTER)
    ]


PLANS = {name: case.config for name, case in CASES.items()} | {"all": ALL_METHODS}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "pooled"),
    [*((name, True) for name in PLANS), ("full", False), ("qr_add", False), ("all", False)],
)
def test_two_ranks_save_and_any_world_goes_on(workers, tmp_path, name, pooled):
    plan = PLANS[name]
    folder = str(tmp_path / "checkpoint")
    saved = setup_of(plan, "row_wise", pooled)
    losses = workers.run(2, train_and_save, saved, folder)[0]

    weights, alone = train_without_ranks(saved)
    assert losses == pytest.approx(alone, abs=2e-6)

    # Without ranks, without a process group: the way to export.
    whole = saved.model(seed=9)
    state = {"model": whole.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    whole.load_state_dict(state["model"])
    expect_equal_weights(whole.state_dict(), weights)

    for world_size, sharding in ((1, "table_wise"), (4, "column_wise"), (4, "row_wise")):
        setup = setup_of(plan, sharding, pooled)
        workers.run(world_size, load_and_train_on, setup, folder, losses)
