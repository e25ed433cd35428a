"""Ranks wait for each other where rows are split between them, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from embcomp.backends import QR
from embcomp.planning.planner import RowSharder
from embcomp.tables.specs import splits_by_rows
from embcomp.testing.sharded import Setup, reference_optimizer, shard, train_step
from embcomp.training.distributed.process import Process
from embcomp.training.distributed.sharding_plan import plan_sharding
from tests.helpers.backends_under_test import CASES

pytestmark = pytest.mark.slow


def step_alone(setups):
    """One rank of several looks up and trains what nobody has sharded; the others are elsewhere."""
    if dist.get_rank() != 0:
        return
    for setup in setups:
        model = setup.model(seed=1)
        train_step(model, reference_optimizer(setup, model), setup.batch(0, 0))
        assert model.tables.route.holder.held.equal_among is None, setup


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "unpooled"])
def test_a_rank_that_uses_a_collection_alone_waits_for_nobody(workers, pooled):
    """A rank that waited would wait in vain, and fail when the group's time is over."""
    dims = (16, 8, 10) if pooled else (10, 10, 10)
    setups = [Setup(plan=case.config, pooled=pooled, dims=dims) for case in CASES.values()]
    workers.run(2, step_alone, setups)


def groups_by_sharding(shardings):
    found = {}
    for sharding in shardings:
        setup = Setup(plan=QR(divisor=9), sharding=sharding)
        model, _ = shard(setup, setup.model(seed=1))
        model(setup.batch(0, dist.get_rank()))
        held = model.module.tables.route.holder.held
        found[sharding] = held.equal_among is dist.group.WORLD
        assert found[sharding] or held.equal_among is None
    return found


def test_only_rows_that_are_split_between_ranks_need_equally_many_bags(workers):
    kinds = ("table_wise", "row_wise", "column_wise", "data_parallel")
    wanted = {kind: kind == "row_wise" for kind in kinds}
    assert workers.run(2, groups_by_sharding, kinds) == [wanted, wanted]


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
@pytest.mark.parametrize("case", CASES)
def test_training_splits_the_rows_of_every_method(case, sharding):
    setup = Setup(plan=CASES[case].config, dims=(16, 16, 16))
    model = setup.model(seed=0, device=torch.device("meta"))
    two = Process(0, 2, torch.device("cpu"))
    plan = plan_sharding(model, RowSharder(), two, sharding, 5, "sgd", {}).plan
    for path, inner in model.named_modules():
        if type(inner) is EmbeddingBagCollection:
            for table in inner.embedding_bag_configs():
                rows, by_rows = table.num_embeddings, sharding == "row_wise"
                can = splits_by_rows(rows, 2) if by_rows else table.embedding_dim % 8 == 0
                wanted = sharding if can or not by_rows else "table_wise"
                assert plan[path][table.name].sharding_type == wanted, table.name
                ranks = plan[path][table.name].ranks
                assert len(ranks) == (2 if can else 1)
