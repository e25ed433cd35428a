"""Sharded by TorchRec in any way, every method trains as it does in one process."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.models.dlrm import DLRM

from embcomp.backends import QR, Full, Hash, Unified
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.testing.check_data import joined, plain_tables, random_batch
from embcomp.testing.sharded import (
    Setup,
    check_meta_build,
    check_sharded_equals_unsharded,
    expect_equal_weights,
    mean_over_ranks,
    reference_optimizer,
    shard,
    train_step,
)
from tests.helpers.backends_under_test import CASES, EACH_METHOD, STORED_INTEGERS
from tests.helpers.long import long_but

pytestmark = pytest.mark.slow

SHARDINGS = ("table_wise", "row_wise", "column_wise", "data_parallel", "mixed")
POOLED = pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "unpooled"])
ALL_METHODS = {
    "t0": QR(divisor=9),
    "t1": Unified(num_buckets=40),
    "t2": Hash(num_buckets=20, collisionless=0),
}


def check_each(check, setups):
    """Run on every rank; a failure names its setup."""
    for setup in setups:
        try:
            check(setup)
        except Exception as error:
            raise AssertionError(str(setup)) from error


def widths(pooled):
    return (16, 8, 10) if pooled else (10, 10, 10)


@pytest.mark.parametrize(
    ("case", "pooled"),
    long_but(
        [*((case, True) for case in CASES), *((case, False) for case in EACH_METHOD)],
        itertools.product(CASES, (True, False)),
    ),
)
def test_two_ranks_equal_one_process(workers, case, pooled):
    setups = [
        Setup(plan=CASES[case].config, sharding=sharding, pooled=pooled, dims=widths(pooled))
        for sharding in SHARDINGS
    ]
    workers.run(2, check_each, check_sharded_equals_unsharded, setups)


@pytest.mark.parametrize(
    ("world_size", "pooled"),
    long_but([(4, True)], [(4, True), (4, False), (1, True), (1, False)]),
)
@pytest.mark.parametrize("case", CASES)
def test_one_and_four_ranks_equal_one_process(workers, case, world_size, pooled):
    shardings = ("table_wise", "mixed") if world_size == 1 else ("row_wise", "column_wise", "mixed")
    setups = [
        Setup(plan=CASES[case].config, sharding=sharding, pooled=pooled, dims=widths(pooled))
        for sharding in shardings
    ]
    workers.run(world_size, check_each, check_sharded_equals_unsharded, setups)


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
def test_other_row_optimizers(workers, optimizer):
    # Each column shard keeps a row-wise state of its own, so column-wise is another algorithm.
    shardings = SHARDINGS if optimizer == "sgd" else ("table_wise", "row_wise", "data_parallel")
    setups = [
        Setup(plan=CASES[case].config, sharding=sharding, optimizer=optimizer)
        for case, sharding in itertools.product(("full", "qr_mult", "unified_projected"), shardings)
    ]
    workers.run(2, check_each, check_sharded_equals_unsharded, setups)


@pytest.mark.parametrize("case", long_but(EACH_METHOD, CASES))
def test_weighted_bags(workers, case):
    setups = [
        Setup(plan=CASES[case].config, sharding=sharding, weighted=True)
        for sharding in ("row_wise", "mixed")
    ]
    workers.run(2, check_each, check_sharded_equals_unsharded, setups)


def test_single_valued_features(workers):
    setups = [
        Setup(
            plan=case.config,
            sharding=sharding,
            shape="single",
            pooled=pooled,
            dims=(8, 8, 8),
            # Of a network's weights, Adagrad's first step takes rounding for a gradient.
            optimizer="sgd" if name == "dhe" else "adagrad",
        )
        for name, case in CASES.items()
        for sharding, pooled in (("row_wise", True), ("table_wise", False))
    ]
    workers.run(2, check_each, check_sharded_equals_unsharded, setups)


@POOLED
def test_several_methods_in_one_collection(workers, pooled):
    """One of them per row, so that a pooled collection holds two inner ones."""
    setups = [
        Setup(plan=ALL_METHODS, sharding=sharding, pooled=pooled, dims=widths(pooled))
        for sharding in SHARDINGS
    ]
    for world_size in (2, 4):
        workers.run(world_size, check_each, check_sharded_equals_unsharded, setups)


@pytest.mark.parametrize("dim", [1, 2, 3, 6])
def test_widths_that_fused_kernels_refuse_are_padded(workers, dim):
    setups = [
        Setup(plan=plan, sharding=sharding, dims=(dim, dim, dim), pooled=pooled)
        for plan in (Full(), QR(divisor=9), Unified(num_buckets=50))
        for sharding in ("row_wise", "column_wise")
        for pooled in (True, False)
    ]
    workers.run(2, check_each, check_sharded_equals_unsharded, setups)


def test_meta_builds_get_good_weights_and_equal_routes(workers):
    setups = [
        Setup(plan=case.config, sharding=sharding, pooled=pooled, dims=widths(pooled))
        for case in CASES.values()
        for sharding, pooled in (("row_wise", True), ("mixed", False))
    ]
    for world_size in (1, 2):
        workers.run(world_size, check_each, check_meta_build, setups)


def count_optimizer_bytes(setup):
    sharded, optimizer = shard(setup, setup.model(seed=1))
    train_step(sharded, optimizer, setup.batch(0, 0))
    states = sharded.fused_optimizer.state_dict()["state"].values()
    tensors = [
        part.tensor for state in states for value in state.values() for part in value.local_shards()
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad"])
def test_optimizer_state_takes_the_bytes_predicted(workers, optimizer):
    for plan in (Full(), QR(divisor=9), CASES["unified_projected"].config):
        setup = Setup(plan=plan, optimizer=optimizer, dims=(10, 3, 8))
        predicted = setup.model(seed=0).tables.footprint.optimizer_bytes(optimizer)
        assert workers.run(1, count_optimizer_bytes, setup) == [predicted]


def expect_refused(setup, bad):
    sharded, _ = shard(setup, setup.model(seed=1))
    batch = setup.batch(0, 0)  # the same on every rank, so that all of them refuse it
    batch.sparse.values()[-1] = bad
    with pytest.raises(ValueError, match=rf"feature 'f2': id {bad} is not in \[0, 90\)"):
        sharded(batch)


@pytest.mark.parametrize("case", ["full", "qr_mult", "qr_add"])
@pytest.mark.parametrize("bad", [90, -1, 2**40])
def test_ids_out_of_range_are_refused_by_name_when_sharded(workers, case, bad):
    workers.run(2, expect_refused, Setup(plan=CASES[case].config, sharding="row_wise"), bad)


def check_default_plan(config):
    """TorchRec's own model, planner and sharders: nothing but the tables is ours."""
    tables = plain_tables(8)
    models = []
    for seed in (1, 2 + dist.get_rank()):
        torch.manual_seed(seed)
        collection = CompressedEmbeddingBagCollection([t.bag() for t in tables], config)
        models.append(DLRM(collection, 3, [6, 8], [5, 1]))
    reference, model = models
    sharded = DistributedModelParallel(model, device=torch.device("cpu"))
    weights = {name: weight.clone() for name, weight in reference.state_dict().items()}
    sharded.load_state_dict(OrderedDict(weights))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (reference, sharded)]
    for step in range(3):
        parts = [random_batch(tables, seed=10 * step + other) for other in range(world_size)]
        torch.manual_seed(step)
        dense = torch.randn(world_size, 6, 3)
        losses = []
        for net, optimizer, rows, ids in zip(
            (reference, sharded),
            optimizers,
            (dense.flatten(0, 1), dense[rank]),
            (joined(parts), parts[rank]),
        ):
            optimizer.zero_grad()
            loss = net(rows, ids).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert mean_over_ranks(losses[1]) == pytest.approx(losses[0], rel=1e-5)
    for module in (*sharded.modules(), *reference.modules()):
        if isinstance(module, CompressedEmbeddingBagCollection):
            module.settle()
    expect_equal_weights(sharded.state_dict(), reference.state_dict())


@pytest.mark.parametrize("case", [case for case in CASES if case not in STORED_INTEGERS])
def test_torchrecs_planner_shards_torchrecs_dlrm_on_every_method(workers, case):
    workers.run(2, check_default_plan, CASES[case].config)


def run_other_weights(setup):
    """The check itself: with one weight changed, nothing may pass for equal."""
    reference = setup.model(seed=1)
    sharded, optimizer = shard(setup, setup.model(seed=2), weights=reference.state_dict())
    before = reference.state_dict()
    name = next(name for name in before if ".rows." in name)
    before[name][0, 0] += 1e-3
    with pytest.raises(AssertionError, match="rows"):
        if dist.get_rank() == 0:
            expect_equal_weights(sharded.state_dict(), before)
        else:
            raise AssertionError("rows of rank 0 differ")
    loss = train_step(sharded, optimizer, setup.batch(0, 0))
    wanted = train_step(reference, reference_optimizer(setup, reference), setup.global_batch(1))
    assert abs(mean_over_ranks(loss) - wanted) > 1e-5


def test_the_comparison_can_fail(workers):
    workers.run(2, run_other_weights, Setup(plan=Full(), sharding="row_wise"))
