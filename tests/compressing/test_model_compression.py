"""`compress_`: trained collections of any kind become compressed ones, in place and within the budget."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType

import embcomp
from embcomp import (
    DNIS,
    LR2VQ,
    PQ,
    BudgetError,
    CompressedEmbeddingBagCollection,
    ConfigError,
    DataError,
    Full,
    Hash,
    LowDim,
    LowRank,
    Plan,
    compress_,
)
from embcomp.collection.single_table import embeddings_of

ROWS = {"a": 300, "b": 200, "few": 5}
DIM = 8


def configs(kind=EmbeddingBagConfig, **more):
    return [
        kind(
            name=name,
            num_embeddings=rows,
            embedding_dim=DIM,
            feature_names=[name],
            weight_init_min=-1.0,
            weight_init_max=1.0,
            **more,
        )
        for name, rows in ROWS.items()
    ]


class Model(nn.Module):
    """Every kind of collection that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bags = EmbeddingBagCollection(tables=configs())
        self.inner = nn.Sequential(nn.Embedding(300, DIM, padding_idx=3), nn.Linear(DIM, 2))
        self.pool = nn.EmbeddingBag(200, DIM, mode="mean", padding_idx=7)
        self.sequence = EmbeddingCollection(tables=configs(EmbeddingConfig))

    def forward(self, bags, ids, offsets):
        pooled = self.bags(bags).values().sum()
        single = sum(each.values().sum() for each in self.sequence(bags).values())
        return pooled, single, self.inner(ids), self.pool(ids.flatten() % 200, offsets)


def batch():
    values = torch.tensor([1, 299, 3, 3, 199, 0, 4])
    return KeyedJaggedTensor(
        keys=list(ROWS), values=values, lengths=torch.tensor([2, 1, 0, 2, 1, 1])
    )


INPUTS = (batch(), torch.tensor([[1, 3], [199, 7]]), torch.tensor([0, 1, 1]))


def test_full_tables_answer_as_before_whatever_held_them():
    model = Model().eval()
    before = model(*INPUTS)
    report = compress_(model, Full())
    for old, new in zip(before, model(*INPUTS)):
        assert torch.allclose(old, new, atol=1e-6)
    assert report.model is model
    assert {line.error.error for line in report.tables} == {0.0}
    kinds = {type(module).__name__ for module in model.modules()}
    assert not kinds & {"Embedding", "EmbeddingCollection"}


@pytest.mark.parametrize(
    ("pooling", "is_weighted"),
    [(PoolingType.SUM, False), (PoolingType.MEAN, False), (PoolingType.SUM, True)],
)
def test_pooling_and_weights_stay_what_they_were(pooling, is_weighted):
    torch.manual_seed(0)
    tables = EmbeddingBagCollection(tables=configs(pooling=pooling), is_weighted=is_weighted)
    features = batch()
    if is_weighted:
        features = KeyedJaggedTensor(
            features.keys(), features.values(), torch.rand(7), features.lengths()
        )
    before = tables(features).values()
    found = compress_(tables, Full()).model
    assert torch.allclose(found(features).values(), before, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        PQ(budget="20%"),
        LR2VQ(budget="20%"),
        LowRank(budget="40%"),
        LowDim(budget="40%"),
        DNIS(budget="40%"),
    ],
    ids=lambda method: method.name,
)
def test_every_method_that_can_begin_from_rows_stays_within_its_budget(method, tmp_path):
    model = Model()
    weight = model.bags.embedding_bags["a"].weight.detach().clone()
    report = compress_(model, method, include="^bags$")
    allowed = int(sum(ROWS.values()) * DIM * 4 * float(method.budget.strip("%")) / 100)
    assert report.bytes == model.bags.footprint.serve_bytes <= allowed
    line = next(line for line in report.tables if line.table == "a")
    now = embeddings_of(model.bags, "a", torch.arange(300)).detach()
    squares = (now - weight).square().sum(1)
    assert line.error.error == pytest.approx(float((squares.sum() / weight.square().sum()).sqrt()))
    assert line.error.worst_row == int(squares.argmax())
    assert 0.05 < line.error.error < 1
    assert isinstance(model.sequence, EmbeddingCollection)  # include did not choose it
    saved = embcomp.save(model.bags, tmp_path / "artefact")
    assert saved.config.tables.bytes == report.bytes
    assert str(report).count("\n") == 4


def test_pq_asks_the_rows_how_to_spend_its_bytes():
    """Whole rows repeat: the theory of unknown rows would cut them, the rows themselves would not."""
    torch.manual_seed(0)
    kinds = torch.randn(16, DIM)
    table = nn.Embedding(4096, DIM)
    table.weight.data = kinds[torch.randint(16, (4096,))]
    report = compress_(nn.Sequential(table), PQ(budget="3%"))
    assert report.tables[0].error.error < 1e-6


def test_counts_decide_what_is_kept():
    torch.manual_seed(0)
    table = nn.Embedding(400, DIM)
    rows = table.weight.detach().clone()
    counts = torch.randperm(400)
    report = compress_(
        nn.Sequential(table), LowDim(kept={"table_0": 100}), counts={"table_0": counts}
    )
    now = embeddings_of(report.model[0].tables, "table_0", torch.arange(400))
    assert torch.equal(now, rows * (counts >= 300).unsqueeze(1))


def test_without_counts_rows_of_the_largest_norms_are_kept():
    torch.manual_seed(0)
    table = nn.Embedding(400, DIM)
    norms = table.weight.detach().norm(dim=1)
    report = compress_(nn.Sequential(table), LowDim(kept={"table_0": 100}))
    now = embeddings_of(report.model[0].tables, "table_0", torch.arange(400))
    assert torch.equal(now.norm(dim=1) > 0, norms >= norms.sort().values[300])


def test_a_budget_in_bytes_is_shared_by_all_collections():
    model = Model()
    report = compress_(model, Plan(default=PQ(), budget=6_000), include="bags|sequence")
    assert 4_000 < report.bytes <= 6_000
    assert len(report.tables) == 6


def test_our_own_full_tables_are_compressed_too_and_compressed_ones_left():
    tables = CompressedEmbeddingBagCollection(configs(), Full())
    model = nn.Sequential(tables)
    compress_(model, PQ(budget="20%"))
    assert model[0].plan.methods["a"].name == "coded"
    with pytest.raises(ConfigError, match="nothing to compress"):
        compress_(model, PQ(budget="20%"))


def test_a_module_that_stands_twice_is_replaced_twice_and_a_tied_weight_is_told():
    model = nn.Module()
    model.first = model.second = nn.Embedding(300, DIM)
    model.head = nn.Linear(DIM, 300, bias=False)
    model.head.weight = model.first.weight
    report = compress_(model, PQ(subvector_dim=4, num_codewords=16))
    assert model.first is model.second
    assert len(report.tables) == 1
    assert "head.weight is the same tensor" in str(report)


def refused(model, plan, **more):
    before = dict(model.named_modules())
    with pytest.raises((ConfigError, DataError, BudgetError)) as caught:
        compress_(model, plan, **more)
    assert dict(model.named_modules()) == before  # nothing was changed
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("plan", "more", "said"),
    [
        (
            Hash(budget="10%"),
            {},
            r"hash: cannot begin .* full, int16, int8, low_dim, low_rank, lr2vq, pq, typed_blocks can",
        ),
        (Plan(overrides={"a": Hash(num_buckets=9)}), {}, "hash: cannot begin"),
        ({"nowhere": PQ(subvector_dim=4)}, {}, "no table is called 'nowhere'"),
        (PQ(budget=50), {}, r"smallest pq reaches .* another method \(.*low_dim, low_rank"),
        (PQ(budget="20%"), {"include": "nowhere"}, "include chooses none of bags "),
        (PQ(budget="20%"), {"include": "("}, "no regular expression"),
        (PQ(budget="20%"), {"counts": {"a": torch.ones(9)}}, r"'a' has 300 ids.*got \(9,\)"),
        (PQ(budget="20%"), {"counts": {"aa": torch.ones(9)}}, "did you mean 'a'"),
        (PQ(budget="20%"), {"counts": {"a": torch.full((300,), -1.0)}}, "id 0 has -1.0"),
        (PQ(budget="20%"), {"counts": {"a": torch.full((300,), torch.nan)}}, "id 0 has nan"),
    ],
)
def test_what_cannot_be_is_refused_by_name(plan, more, said):
    assert re.search(said, refused(Model(), plan, **more))


def test_rows_with_nan_are_refused_with_their_place():
    model = Model()
    model.bags.embedding_bags["b"].weight.data[17, 2] = torch.nan
    assert "table 'b' of bags: row 17 holds NaN" in refused(model, PQ(budget="20%"))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Embedding(300, DIM, max_norm=1.0), "max_norm"),
        (nn.EmbeddingBag(300, DIM, mode="max"), "mode='max'"),
        (nn.Linear(3, 2), "there is no EmbeddingBagCollection"),
    ],
)
def test_modules_that_no_compressed_table_can_stand_for_are_refused(module, said):
    assert said in refused(nn.Sequential(module), PQ(subvector_dim=4))
