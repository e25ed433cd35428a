"""Features of different lengths side by side: the same answers, in the memory that their ids need."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.collection.each_pair import EachPair
from embcomp.collection.held_rows import HeldRows
from embcomp.testing.check_data import awkward_tables, feature_rows, plain_tables
from tests.helpers.backends_under_test import CASES

POOLED = pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "unpooled"])


def long_batch(tables, *, bags, batch_size=3, weighted=False):
    """Bags of so many ids, one length a feature."""
    draw = torch.Generator().manual_seed(5)
    limits = feature_rows(tables)
    counts = [batch_size * size for size in bags]
    ids = [torch.randint(0, rows, (n,), generator=draw) for rows, n in zip(limits.values(), counts)]
    return KeyedJaggedTensor(
        keys=list(limits),
        values=torch.cat(ids),
        lengths=torch.tensor(bags, dtype=torch.int32).repeat_interleave(batch_size),
        weights=torch.rand(sum(counts), generator=draw) if weighted else None,
        stride=batch_size,
        length_per_key=counts,
    )


def make(config, tables, *, pooled, weighted=False):
    torch.manual_seed(3)
    if pooled:
        bags = [table.bag() for table in tables]
        return CompressedEmbeddingBagCollection(bags, config, is_weighted=weighted)
    return CompressedEmbeddingCollection([table.unpooled() for table in tables], config)


def trained_step(collection, batch):
    """What comes out, and the gradients of everything."""
    found = collection(batch)
    parts = found.to_dict().values() if hasattr(found, "to_dict") else found.values()
    outputs = [part if isinstance(part, torch.Tensor) else part.values() for part in parts]
    loss = sum((output * output.detach().cos()).sum() for output in outputs)
    if collection.penalty() is not None:
        loss = loss + collection.penalty()
    loss.backward()
    grads = {name: p.grad for name, p in collection.named_parameters()}
    return outputs, grads, dict(collection.named_buffers())


@POOLED
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_long_feature_gets_what_it_gets_in_a_padded_rectangle(
    monkeypatch, case, pooled, training
):
    tables = awkward_tables((8, 4, 16) if pooled else (8, 8, 8))
    batch = long_batch(tables, bags=(1, 7, 0))

    def step():
        collection = make(CASES[case].config, tables, pooled=pooled).train(training)
        return trained_step(collection, batch)

    by_key = step()
    monkeypatch.setattr(HeldRows, "by", classmethod(lambda cls, inner: cls()))
    cut_out = step()  # of a rectangle, as a sharded collection returns it
    monkeypatch.setattr(EachPair, "combine", EachPair._padded)
    for other in (cut_out, step()):
        for one, two in zip(by_key, other):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["qr_mult", "optembed", "low_rank_bias", "lr2vq"])
def test_weights_of_ids_count_in_long_bags(case):
    tables = plain_tables(8)
    batch = long_batch(tables, bags=(1, 5, 2), weighted=True)
    collection = make(CASES[case].config, tables, pooled=True, weighted=True).eval()
    rows = make(CASES[case].config, tables, pooled=False).eval()
    rows.load_state_dict(collection.state_dict(), strict=False)
    weights = dict(zip(batch.keys(), batch.weights().split(batch.length_per_key())))
    ids = KeyedJaggedTensor(
        keys=batch.keys(), values=batch.values(), lengths=batch.lengths(), stride=batch.stride()
    )
    pooled = collection(batch).to_dict()
    for feature, each in rows(ids).items():
        weighed = each.values() * weights[feature].unsqueeze(1)
        wanted = weighed.view(3, -1, 8).sum(1)
        torch.testing.assert_close(pooled[feature], wanted)


def peak_bytes(collection, batch):
    """The most that torch's allocator held at once for a step, FBGEMM's tensors included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = collection(batch)
        parts = found.values() if isinstance(found, dict) else [found]
        sum(part.values().sum() for part in parts).backward()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


MEASURED = ("full", "hash", "qr_mult", "optembed", "low_rank_bias", "lr2vq", "dnis_search", "coded")


@POOLED
@pytest.mark.parametrize("case", MEASURED)
def test_memory_follows_ids_and_not_the_longest_key(case, pooled):
    """Of 26 tables one has a hundred ids a sample: a rectangle would take 26 times its rows."""
    tables = plain_tables(16, rows=[100] * 26)
    batch = long_batch(tables, bags=[1] * 25 + [100], batch_size=64)
    collection = make(CASES[case].config.for_tables([]), tables, pooled=pooled)
    theirs = (
        EmbeddingBagCollection(tables=[table.bag() for table in tables])
        if pooled
        else EmbeddingCollection(tables=[table.unpooled() for table in tables])
    )
    rows, peak = 64 * 100 * 16 * 4, peak_bytes(theirs, batch)
    allowed = 1.5 * peak if case == "full" and not pooled else peak + 14 * rows
    assert peak_bytes(collection, batch) < allowed
