"""Rows read by compiled code: torch's answers and gradients, to the bit where nothing but order could differ."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.collection import compiled_rows
from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.collection.compiled_rows import KeyRead, ReadBags, RowReads, library
from embcomp.testing.check_data import awkward_tables, feature_rows, random_batch
from tests.helpers.backends_under_test import CASES

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")

DRAWN = ("full", "qr_add", "unified", "blocks", "coded", "lr2vq", "low_rank_bias")


def make(case, *, pooled, weighted=False):
    torch.manual_seed(3)
    tables = awkward_tables((8, 5, 16) if pooled else (8, 8, 8))
    if pooled:
        bags = [table.bag() for table in tables]
        return CompressedEmbeddingBagCollection(bags, CASES[case].config, is_weighted=weighted)
    return CompressedEmbeddingCollection([t.unpooled() for t in tables], CASES[case].config)


def stepped(collection, batch):
    """What comes out, and the gradients of everything."""
    found = collection(batch)
    parts = [found.values()] if hasattr(found, "to_dict") else [f.values() for f in found.values()]
    sum((part * part.detach().cos()).sum() for part in parts).backward()
    return parts, {name: p.grad for name, p in collection.named_parameters()}


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "unpooled"])
@pytest.mark.parametrize("case", DRAWN)
def test_a_step_is_that_of_torch(case, pooled, monkeypatch):
    batch = random_batch(awkward_tables((8, 8, 8)), seed=2, shape="ragged")
    compiled = stepped(make(case, pooled=pooled), batch)
    monkeypatch.setattr(compiled_rows, "library", lambda: None)
    by_torch = stepped(make(case, pooled=pooled), batch)
    for own, other in zip(compiled[0], by_torch[0]):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(compiled[1], by_torch[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ["single", "ragged", "empty"])
@pytest.mark.parametrize("weighted", [False, True])
def test_pooled_rows_are_equal_to_the_bit(shape, weighted, monkeypatch):
    tables = awkward_tables((8, 5, 16))
    batch = random_batch(tables, seed=1, shape=shape, weighted=weighted)
    found = make("full", pooled=True, weighted=weighted)(batch).values()
    monkeypatch.setattr(compiled_rows, "library", lambda: None)
    assert torch.equal(found, make("full", pooled=True, weighted=weighted)(batch).values())


@pytest.mark.parametrize("width", [1, 3, 4, 8, 16, 19, 32])
def test_sums_and_both_derivatives(width):
    draw = torch.Generator().manual_seed(width)
    table = torch.randn(30, width, generator=draw, requires_grad=True)
    lengths = torch.randint(0, 5, (40,), generator=draw)
    ids = torch.randint(0, 30, (int(lengths.sum()),), generator=draw)
    weights = torch.rand(len(ids), generator=draw)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    bags = ReadBags(counts=[len(ids)], bags=[40], offsets=offsets, ids=ids, weights=weights)
    reads = RowReads([KeyRead(table=0, width=width)], [width])

    def derivatives(sums):
        (first,) = torch.autograd.grad((sums**3).sum(), table, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), table)
        return sums.detach(), first.detach(), second

    by_torch = nn.functional.embedding_bag(
        ids, table, offsets, mode="sum", include_last_offset=True, per_sample_weights=weights
    )
    pooled = torch.zeros(40, width).index_add(
        0, torch.arange(40).repeat_interleave(lengths), table[ids] * weights[:, None]
    )
    found = derivatives(reads.sums([table], bags)[0])
    assert torch.equal(found[0], by_torch.detach())
    for own, other in zip(found, derivatives(pooled)):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_values_that_are_rows_themselves():
    rows = [torch.randn(7, 4, requires_grad=True), torch.randn(3, 6, requires_grad=True)]
    offsets = torch.tensor([0, 3, 3, 7, 7, 8, 10])
    bags = ReadBags(counts=[7, 3], bags=[3, 3], offsets=offsets)
    reads = RowReads([KeyRead(table=0, width=4), KeyRead(table=1, width=6, into=4)], [10])
    (found,) = reads.sums(rows, bags)
    wanted = torch.stack([rows[0][:3].sum(0), torch.zeros(4), rows[0][3:].sum(0)])
    torch.testing.assert_close(found[:, :4], wanted)
    found.backward(torch.arange(30.0).view(3, 10))
    assert torch.equal(rows[0].grad[:, 0], torch.tensor([0.0, 0, 0, 20, 20, 20, 20]))
    assert torch.equal(rows[1].grad[:, 0], torch.tensor([14.0, 24, 24]))


def test_ids_of_no_row_are_refused():
    reads = RowReads([KeyRead(table=0, width=2)], [2])
    for bad in (-1, 5):
        with pytest.raises(IndexError, match="no row"):
            reads.read(
                [torch.zeros(5, 2)], ReadBags(counts=[1], bags=[1], size=1, ids=torch.tensor([bad]))
            )


def test_ids_that_someone_writes_to_before_the_gradient_are_noticed():
    ids, table = torch.tensor([1, 2]), torch.ones(5, 2, requires_grad=True)
    reads = RowReads([KeyRead(table=0, width=2)], [2])
    (found,) = reads.sums([table], ReadBags(counts=[2], bags=[2], size=1, ids=ids))
    ids.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_hooks_on_tables_are_called():
    collection = make("full", pooled=True)
    seen = []
    first = next(iter(collection.rows.embedding_bags.values()))
    first.register_forward_hook(lambda *_: seen.append(1))
    collection(random_batch(awkward_tables((8, 8, 8)), seed=2))
    assert seen


def test_other_float_types_are_read_by_torch():
    collection = make("full", pooled=True).double()
    assert collection(random_batch(awkward_tables((8, 8, 8)), seed=2)) is not None


def test_threads_change_nothing():
    tables = awkward_tables((8, 8, 8))
    sizes = feature_rows(tables)
    counts = [6000] * len(sizes)
    ids = torch.cat([torch.randint(0, rows, (6000,)) for rows in sizes.values()])
    lengths = torch.full((3000 * len(sizes),), 2)
    batch = KeyedJaggedTensor(
        keys=list(sizes), values=ids, lengths=lengths, stride=3000, length_per_key=counts
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(stepped(make("coded", pooled=True), batch))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0][0], found[1][0][0])
    assert all(torch.equal(found[0][1][name], grad) for name, grad in found[1][1].items())
