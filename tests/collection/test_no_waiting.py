"""Elsewhere than on a CPU no training step looks at a value, and what comes out is the same."""

from __future__ import annotations

import copy

import pytest
import torch

from embcomp.backends import LR2VQ
from embcomp.backends.full import RangeCheck, wait_for_checks
from embcomp.layers import host_values
from embcomp.testing.cases import BackendCase, pooled, unpooled
from embcomp.testing.check_data import awkward_tables, batch_of, plain_tables, random_batch
from tests.helpers.backends_under_test import CASES, STORED_INTEGERS
from tests.helpers.dispatched import Dispatched

SKIPPING = {"adapt_zero", "blocks", "double_hash", "mapped", "robe", "sparse", "typed_blocks"}
"""Their routes skip ids, and TorchRec must know how many ids each key has left to look up."""


@pytest.fixture
def far_device(monkeypatch):
    """Make the CPU's values count as ones that must be waited for."""
    monkeypatch.setattr(host_values, "AT_HAND", frozenset())


def batch_for(tables, shape, *, weighted=False, seed=0):
    batch = random_batch(tables, seed=seed, shape=shape, weighted=weighted)
    batch.length_per_key()  # loaders know it
    return batch


def step(collection, batch):
    """A training step's outputs and gradients."""
    collection.zero_grad()
    out = collection(batch)
    values = out.values() if hasattr(out, "length_per_key") else [v.values() for v in out.values()]
    loss = sum(part.pow(2).sum() for part in ([values] if torch.is_tensor(values) else values))
    penalty = collection.penalty()
    (loss if penalty is None else loss + penalty).backward()
    return [loss.detach(), *(p.grad.clone() for p in collection.parameters())]


def collections_of(case):
    yield pooled(case, awkward_tables()).train(), awkward_tables(), False
    yield pooled(case, awkward_tables(), is_weighted=True).train(), awkward_tables(), True
    yield unpooled(case, awkward_tables((8, 8, 8))).train(), awkward_tables((8, 8, 8)), False


NEVER_WAITING = [name for name in CASES if name not in STORED_INTEGERS]
"""Touched rows of stored integers are counted between two steps, for which the host waits."""


@pytest.mark.parametrize("name", NEVER_WAITING)
def test_a_step_looks_at_no_value_and_computes_the_same(name, monkeypatch):
    skips = not SKIPPING.isdisjoint((name, CASES[name].config.name))
    for collection, tables, weighted in collections_of(CASES[name]):
        for shape in ("single", "ragged"):
            batches = [batch_for(tables, shape, weighted=weighted, seed=n) for n in range(2)]
            near = copy.deepcopy(collection)
            wanted = [step(near, batch) for batch in batches]
            with monkeypatch.context() as patch:
                patch.setattr(host_values, "AT_HAND", frozenset())
                far = copy.deepcopy(collection)
                first = step(far, batches[0])  # makes what is made once
                with Dispatched() as seen:
                    second = step(far, batches[1])
            reads = {read for read in seen.reads if not (skips and "collection/route.py" in read)}
            assert not reads
            for found, want in zip((*first, *second), (*wanted[0], *wanted[1])):
                torch.testing.assert_close(found, want)
            assert all(
                torch.allclose(a, b) for a, b in zip(far.buffers(), near.buffers(), strict=True)
            )


def test_a_bad_id_is_named_a_step_later(far_device):
    tables = plain_tables(4)
    collection = pooled(CASES["full"], tables).train()
    good = batch_of({"f0": [[1]], "f1": [[2]], "f2": [[3]]})
    bad = batch_of({"f0": [[1]], "f1": [[2, 90]], "f2": [[-5]]})
    wanted = "'f1': id 90 is not in \\[0, 90\\), the rows of table 't1'.*earlier step"
    found = collection(bad)
    assert torch.equal(  # row 0 took its place
        found["f1"], collection.rows.embedding_bags["t1"].weight[[2, 0]].sum(0, keepdim=True)
    )
    with pytest.raises(ValueError, match=wanted):
        collection(good)
    collection(good)  # it is said once
    collection(bad)
    with pytest.raises(ValueError, match=wanted):
        wait_for_checks(collection)  # as before each evaluation and checkpoint
    collection(bad)
    with pytest.raises(ValueError, match=wanted):
        collection.eval()(good)
    with pytest.raises(ValueError, match="id 90 is not in"):
        collection(bad)  # no answer is wrong where nothing is trained


@pytest.mark.parametrize("name", [name for name in NEVER_WAITING if not CASES[name].takes_any_id])
def test_every_method_survives_a_bad_id_until_it_is_named(name, far_device):
    tables = plain_tables(8)
    collection = pooled(CASES[name], tables).train()
    assert any(isinstance(part, RangeCheck) for part in collection.modules())
    step(collection, batch_of({"f0": [[10**6, 1]], "f1": [[-1]], "f2": [[3]]}))
    with pytest.raises(ValueError, match="'f0': id 1000000"):
        wait_for_checks(collection)
    wait_for_checks(copy.deepcopy(collection))


def test_a_look_up_of_nothing_is_no_bad_id(far_device):
    tables = plain_tables(4)
    collection = pooled(CASES["full"], tables).train()
    for _ in range(2):
        assert not collection(random_batch(tables, seed=0, shape="empty")).values().any()


@pytest.mark.parametrize("batch_size", [16, 2048])
def test_codewords_take_few_operations_at_any_batch_size(batch_size, far_device):
    """On CUDA each is a kernel, which takes longer to launch than to run in small batches."""
    tables = plain_tables(16, rows=[3000] * 26)
    case = BackendCase(config=LR2VQ(subvector_dim=4, num_codewords=256, revive_every=2))
    collection = pooled(case, tables).train()
    (quantize,) = collection.combine.combines.values()
    seen = []
    quantize.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    batch = random_batch(tables, seed=0, batch_size=batch_size, shape="single")
    batch.length_per_key()
    collection(batch)  # makes what is made once
    rows, looked_up = seen[0]
    rows = rows.detach().requires_grad_()
    with Dispatched() as dispatched:
        (quantize(rows, looked_up).sum() + quantize.penalty).backward()  # dead ones are moved too
    assert dispatched.total <= 200


@pytest.mark.gpu
@pytest.mark.parametrize("name", NEVER_WAITING)
def test_a_step_on_a_gpu_never_waits(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not SKIPPING.isdisjoint((name, CASES[name].config.name)):
        pytest.skip("TorchRec must know how many ids are left")
    tables = awkward_tables()
    collection = pooled(CASES[name], tables).train().to("cuda")
    batches = [batch_for(tables, shape, seed=3).to("cuda") for shape in ("single", "ragged")]
    for batch in batches:
        step(collection, batch)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(collection, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    wait_for_checks(collection)
