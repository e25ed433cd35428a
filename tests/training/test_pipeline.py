"""TorchRec's train pipeline overlaps the collections' look-ups instead of skipping them."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.postproc import PipelinedPostproc
from torchrec.distributed.train_pipeline.runtime_forwards import PipelinedForward

from embcomp.testing.sharded import (
    Setup,
    expect_equal_weights,
    reference_optimizer,
    shard,
)
from tests.collection.test_sharding import ALL_METHODS
from tests.helpers.backends_under_test import CASES, STORED_INTEGERS

pytestmark = pytest.mark.slow

WRITTEN = ("adapt", "adapt_zero", "cafe")
STEPS = 5


def check_pipelined(setup, seed):
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    reference = setup.model(seed=seed)
    weights = copy.deepcopy(reference.state_dict())
    sharded, optimizer = shard(setup, setup.model(seed=2), weights=weights)
    pipeline = TrainPipelineSparseDist(
        sharded,
        optimizer,
        torch.device("cpu"),
        execute_all_batches=True,
        pipeline_postproc=True,
    )
    rank = dist.get_rank()
    batches = [setup.batch(step, rank) for step in range(STEPS)]
    logits = []
    stream = iter(batches)
    for _ in range(STEPS):
        logits.append(pipeline.progress(stream).detach())
        tables = sharded.module.tables
        assert isinstance(tables.route, PipelinedPostproc)
        inner = list(tables.inner_collections())
        assert inner
        for collection in inner:
            assert isinstance(collection, ShardedEmbeddingBagCollection)
            assert isinstance(collection.forward, PipelinedForward)
            assert any(collection is module for module in pipeline._pipelined_modules)
    whole = reference_optimizer(setup, reference)
    for step, out in enumerate(logits):
        whole.zero_grad()
        loss, wanted = reference(setup.global_batch(step))
        own = slice(rank * setup.batch_size, (rank + 1) * setup.batch_size)
        torch.testing.assert_close(out, wanted[own].detach(), rtol=1e-4, atol=1e-5)
        loss.backward()
        whole.step()
    expect_equal_weights(sharded.state_dict(), reference.state_dict())
    pipeline.detach()
    sharded.eval()
    with torch.no_grad():
        _, out = sharded(batches[0])
    reference.eval()
    torch.testing.assert_close(out, reference(batches[0])[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "pooled"),
    [
        # Not adapt, cafe and stored integers, whose rows are written between steps: a pipeline routes a
        # batch before the step that comes before it is done.
        *((plan, True) for plan in (*CASES, "all") if plan not in (*WRITTEN, *STORED_INTEGERS)),
        ("full", False),
        ("qr_add", False),
        ("all", False),
    ],
)
def test_inner_collections_are_pipelined_and_train_as_unpipelined(workers, plan, pooled):
    setup = Setup(
        plan=ALL_METHODS if plan == "all" else CASES[plan].config,
        sharding="row_wise" if pooled else "table_wise",
        pooled=pooled,
        dims=(16, 8, 10) if pooled else (10, 10, 10),
        # Adagrad's first steps are as long for a gradient that is nothing but rounding as for any other:
        # a network has many such, rows that are added to others and pooled have some, and of the rest this seed
        # has none.
        optimizer="sgd" if plan == "dhe" or (plan == "qr_add" and pooled) else "adagrad",
    )
    seed = 3 if plan == "unified_projected" else 1
    workers.run(2, check_pipelined, setup, seed)
