"""Rows pay the same decay whether the host knows where a feature's ids end or not."""

from __future__ import annotations

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from embcomp.layers import host_values
from embcomp.training.optim.lazy_decay import LazyDecay, _Kernel
from tests.helpers.dispatched import Dispatched

TABLES = [(10, 8), (7, 4), (5, 12)]
FEATURES = [0, 0, 1, 2]


def kernel_of(tables):
    torch.manual_seed(0)
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in tables],
        feature_table_map=FEATURES,
    )
    for weight in module.split_embedding_weights():
        weight.data.normal_()
    return _Kernel(module)


def look_ups(seed):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(FEATURES), 3), generator=random)
    ids = [
        torch.randint(0, TABLES[table][0], (int(own.sum()),), generator=random)
        for table, own in zip(FEATURES, lengths)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    return torch.cat(ids), offsets


@pytest.mark.parametrize("tables", [TABLES, [(10, 8)] * 3], ids=["several widths", "one width"])
def test_both_ways_of_paying_are_the_same(tables, monkeypatch):
    near, far = kernel_of(tables), kernel_of(tables)
    for step in range(4):
        ids, offsets = look_ups(step)
        near.pay(ids % 5, offsets, due=-0.1 * (step + 1))
        with monkeypatch.context() as patch:
            patch.setattr(host_values, "AT_HAND", frozenset())
            with Dispatched() as seen:
                far.pay(ids % 5, offsets, due=-0.1 * (step + 1))
            assert not seen.reads
        for one, other in zip(near._weights, far._weights):
            assert torch.equal(one, other)
    near.pay_all(-0.5)
    far.pay_all(-0.5)
    for one, other in zip(near._weights, far._weights):
        assert torch.equal(one, other)
    assert not torch.equal(near._weights[0], kernel_of(tables)._weights[0])


def test_a_look_up_of_nothing_pays_nothing(monkeypatch):
    monkeypatch.setattr(host_values, "AT_HAND", frozenset())
    kernel = kernel_of(TABLES)
    before = [weight.clone() for weight in kernel._weights]
    nothing = torch.zeros(len(FEATURES) * 3 + 1, dtype=torch.int64)
    kernel.pay(torch.empty(0, dtype=torch.int64), nothing, due=-1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, kernel._weights))


def test_a_model_without_fused_rows_owes_nothing():
    decay = LazyDecay(torch.nn.Linear(2, 2), weight_decay=0.1)
    decay.start_step(0.1)
    decay.flush()
