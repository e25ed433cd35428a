"""The collections stand in for TorchRec's: equal where nothing is compressed, usable where it is."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import (
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.backends import QR, Full, Hash, Unified
from embcomp.backends.qr import PairProduct
from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.errors import ConfigError
from embcomp.layers.hashing import salt, splitmix64
from embcomp.tables.name_hash import name64
from embcomp.testing.cases import learning, pooled
from embcomp.testing.check_data import awkward_tables, batch_of, plain_tables, random_batch
from tests.helpers.backends_under_test import CASES

SHAPES = ["single", "ragged", "empty", "full_bags"]


def copy_weights(full, theirs):
    """From TorchRec's tables into ours, whose rows are padded to a multiple of 4."""
    tables = {name.split(".")[-2]: weight for name, weight in theirs.named_parameters()}
    for name, weight in full.named_parameters():
        own = tables[name.split(".")[-2]]
        with torch.no_grad():
            weight[:, : own.shape[1]] = own


def two_pooled(tables, *, is_weighted=False):
    torch.manual_seed(0)
    theirs = EmbeddingBagCollection(tables=[t.bag() for t in tables], is_weighted=is_weighted)
    ours = CompressedEmbeddingBagCollection([t.bag() for t in tables], is_weighted=is_weighted)
    copy_weights(ours, theirs)
    return ours, theirs


def assert_same_pooled(ours, theirs, batch):
    found, wanted = ours(batch), theirs(batch)
    assert list(found.keys()) == list(wanted.keys())
    assert found.length_per_key() == wanted.length_per_key()
    torch.testing.assert_close(found.values(), wanted.values(), rtol=1e-6, atol=1e-7)
    return found, wanted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dims", [(8, 4, 16), (1, 2, 3), (6, 10, 5)], ids=str)
def test_full_pools_as_torchrec_does(dims, shape):
    tables = awkward_tables(dims)
    assert_same_pooled(*two_pooled(tables), random_batch(tables, seed=1, shape=shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_full_sums_weighted_bags_as_torchrec_does(shape):
    tables = plain_tables(6)  # torch refuses weighted means, so sums alone
    batch = random_batch(tables, seed=1, shape=shape, weighted=True)
    assert_same_pooled(*two_pooled(tables, is_weighted=True), batch)


def test_weighted_means_divide_by_the_length():
    tables = awkward_tables((4, 4, 4))
    ours = CompressedEmbeddingBagCollection([t.bag() for t in tables], is_weighted=True)
    row = ours.rows.embedding_bags["t1"].weight
    batch = batch_of(
        {"f0": [[]], "f1": [[]], "f2": [[3, 5]]},
        weights={"f0": [[]], "f1": [[]], "f2": [[0.5, 2.0]]},
    )
    torch.testing.assert_close(ours(batch)["f2"][0], (0.5 * row[3] + 2 * row[5]) / 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("need_indices", [True, False])
@pytest.mark.parametrize("dim", [1, 3, 8, 10])
def test_full_looks_up_as_torchrec_does(dim, need_indices, shape):
    tables = awkward_tables((dim, dim, dim))
    theirs = EmbeddingCollection(tables=[t.unpooled() for t in tables], need_indices=need_indices)
    ours = CompressedEmbeddingCollection([t.unpooled() for t in tables], need_indices=need_indices)
    copy_weights(ours, theirs)
    batch = random_batch(tables, seed=2, shape=shape)
    found, wanted = ours(batch), theirs(batch)
    assert list(found) == list(wanted)
    for key, jagged in wanted.items():
        assert torch.equal(found[key].values(), jagged.values())
        assert torch.equal(found[key].lengths(), jagged.lengths())
        assert torch.equal(found[key].offsets(), jagged.offsets())
        if need_indices:
            assert torch.equal(found[key].weights(), jagged.weights())
        else:
            assert found[key].weights_or_none() is None
    assert ours.embedding_names_by_table() == theirs.embedding_names_by_table()
    assert (ours.embedding_dim(), ours.need_indices()) == (dim, need_indices)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad])
def test_full_trains_as_torchrec_does(make):
    tables = awkward_tables((6, 4, 3))
    ours, theirs = two_pooled(tables)
    optimizers = [make(module.parameters(), lr=0.1) for module in (ours, theirs)]
    for step in range(3):
        batch = random_batch(tables, seed=step)
        for module, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            torch.tanh(10 * module(batch).values()).square().sum().backward()
            optimizer.step()
    for name, weight in theirs.named_parameters():
        own = dict(ours.named_parameters())[f"rows.{name}"]
        torch.testing.assert_close(own[:, : weight.shape[1]], weight, rtol=1e-5, atol=1e-6)
    assert_same_pooled(ours, theirs, random_batch(tables, seed=9))


def test_fresh_full_tables_start_as_torchrecs_do():
    config = EmbeddingBagConfig(
        name="t", num_embeddings=400, embedding_dim=8, feature_names=["f"]
    )  # uniform within one over the square root of the rows
    torch.manual_seed(0)
    weight = CompressedEmbeddingBagCollection([config]).rows.embedding_bags["t"].weight
    assert weight.abs().max() <= 0.05
    assert weight.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.05)
    ones = copy.copy(config)
    ones.init_fn = torch.nn.init.ones_
    weight = CompressedEmbeddingBagCollection([ones]).rows.embedding_bags["t"].weight
    assert bool((weight == 1).all())


def test_half_precision_tables():
    config = EmbeddingBagConfig(
        name="t",
        num_embeddings=50,
        embedding_dim=10,
        feature_names=["f"],
        data_type=DataType.FP16,
        pooling=PoolingType.MEAN,
    )
    batch = batch_of({"f": [[1, 2], [3], []]})
    for plan in (Full(), Hash(num_buckets=20, collisionless=0), QR(divisor=5)):
        collection = CompressedEmbeddingBagCollection([config], plan)
        assert collection(batch)["f"].shape == (3, 10)
        tensors = collection.serving_tensors().values()
        size = sum(t.numel() * t.element_size() for t in tensors)
        assert size == collection.footprint.serve_bytes
        assert {t.dtype for t in tensors} == {torch.float16}


class Interaction:
    """Constructors of TorchRec's models around a collection of three tables of width 8."""

    def dlrm(self, tables):
        return DLRM(tables, 4, [6, 8], [5, 1])

    def dlrm_dcn(self, tables):
        return DLRM_DCN(tables, 4, [6, 8], [5, 1], dcn_num_layers=2, dcn_low_rank_dim=3)

    def deepfm(self, tables):
        return SimpleDeepFMNN(4, tables, 6, 3)


MODELS = {
    "dlrm": Interaction().dlrm,
    "dlrm_dcn": Interaction().dlrm_dcn,
    "deepfm": Interaction().deepfm,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_torchrecs_models_train_on_the_collections_unchanged(model, case):
    tables = plain_tables(8)
    torch.manual_seed(0)
    net = MODELS[model](
        learning(CompressedEmbeddingBagCollection([t.bag() for t in tables], CASES[case].config))
    )
    # A network within the tables wants the rate of networks.
    optimizer = torch.optim.Adagrad(net.parameters(), lr=0.01 if case == "dhe" else 0.1)
    dense, sparse = torch.randn(16, 4), random_batch(tables, seed=1, batch_size=16, shape="single")
    labels = torch.randint(0, 2, (16, 1)).float()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        out = net(dense, sparse)
        prediction = out if model == "deepfm" else torch.sigmoid(out)
        loss = torch.nn.functional.binary_cross_entropy(prediction, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("model", MODELS)
def test_torchrecs_models_score_full_collections_as_their_own(model):
    tables = plain_tables(8)
    ours, theirs = two_pooled(tables)
    torch.manual_seed(1)
    net = MODELS[model](theirs)
    torch.manual_seed(1)
    other = MODELS[model](ours)
    dense, sparse = torch.randn(5, 4), random_batch(tables, seed=1, batch_size=5)
    torch.testing.assert_close(other(dense, sparse), net(dense, sparse), rtol=1e-5, atol=1e-6)


def test_configs_are_returned_as_declared_and_left_alone():
    declared = [t.bag() for t in awkward_tables()]
    before = copy.deepcopy(declared)
    collection = CompressedEmbeddingBagCollection(declared, Unified(budget="50%"))
    for now, then, told in zip(declared, before, collection.embedding_bag_configs()):
        for key in ("name", "num_embeddings", "embedding_dim", "feature_names", "pooling"):
            assert getattr(now, key) == getattr(then, key) == getattr(told, key)


def test_several_methods_answer_as_each_alone():
    tables = plain_tables(8)
    plan = {"t0": QR(divisor=9), "t1": Hash(num_buckets=30), "t2": Unified(num_buckets=30)}
    torch.manual_seed(0)
    together = CompressedEmbeddingBagCollection([t.bag() for t in tables], plan)
    batch = random_batch(tables, seed=3)
    out = together(batch).to_dict()
    for table in tables:
        rest = {other.name: Full() for other in tables if other is not table}
        alone = CompressedEmbeddingBagCollection([t.bag() for t in tables], plan | rest)
        weights = alone.state_dict()
        own = {k: v for k, v in together.state_dict().items() if k in weights}
        same = {k: v for k, v in own.items() if v.shape == weights[k].shape}
        assert same
        alone.load_state_dict(weights | same)
        key = table.features[0]
        torch.testing.assert_close(alone(batch)[key], out[key])


def test_unified_pads_what_few_chunks_leave():
    (table,) = plain_tables(8, rows=(60,))
    config = Unified(num_buckets=30, num_chunks=4, chunks={"t0": 3})
    out = CompressedEmbeddingBagCollection([table.bag()], config)(batch_of({"f0": [[5]]}))["f0"]
    assert bool(out[0, :6].all())
    assert not out[0, 6:].any()


def test_qr_looks_rows_up_by_quotient_and_remainder():
    tables = plain_tables(4, rows=(60, 80))
    for combine, join in (
        ("mult", lambda q, r: q * r),
        ("add", lambda q, r: q + r),
        ("concat", lambda q, r: torch.cat((q[:2], r[:2]))),
    ):
        plan = QR(divisor=7, combine=combine)
        collection = CompressedEmbeddingBagCollection([t.bag() for t in tables], plan)
        rows = collection.serving_tensors()["t0"]
        assert len(rows) == 9 + 7
        for id_ in (0, 6, 7, 58, 59):
            wanted = join(rows[id_ // 7], rows[9 + id_ % 7])
            for others in ([[79], [70]], [[], [79, 1, 2]]):  # as many ids in each feature, or not
                found = collection(batch_of({"f0": [[id_], [30]], "f1": others}))["f0"]
                torch.testing.assert_close(found[0], wanted)
                torch.testing.assert_close(found[1], join(rows[4], rows[9 + 2]))


def test_the_gradient_of_multiplied_rows_is_exact_and_never_taken_twice():
    pairs = torch.randn(3000, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    wanted, found = (pairs.clone().requires_grad_() for _ in range(2))
    grad = torch.randn(3000, 2, 4, generator=torch.Generator().manual_seed(1))
    (wanted[:, :, 0] * wanted[:, :, 1]).backward(grad)
    product = PairProduct.apply(found * 1)
    product.backward(grad, retain_graph=True)
    assert found.grad is not None and torch.equal(found.grad, wanted.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward(grad)


@pytest.mark.parametrize("ragged", [False, True])
def test_hashed_rows_follow_seed_table_and_look_up(ragged):
    """Where ids are is part of every saved model: it may never change."""
    tables = awkward_tables((8, 8, 8))
    bags = {"f0": [[3], [59]], "f1": [[7], [8]], "f2": [[2**40], [-5]]}
    if ragged:
        bags["f2"][0].append(11)

    def placed(seed, table, chunk, num_rows):
        id_ = (-5) % 2**64  # the last of f2
        return (splitmix64(id_ ^ salt(seed, name64(table), chunk)) & (2**63 - 1)) % num_rows

    for seed in (2021, 7):
        plan = Hash(num_buckets=40, collisionless=0, seed=seed)
        hashed = CompressedEmbeddingBagCollection([t.bag() for t in tables], plan)
        ids = hashed.route(batch_of(bags))[0]["t1/f2#0"].values()
        assert ids[-1] == placed(seed, "t1", 0, 40)
        plan = Unified(num_buckets=50, num_chunks=2, seed=seed)
        unified = CompressedEmbeddingBagCollection([t.bag() for t in tables], plan)
        for chunk in (0, 1):
            ids = unified.route(batch_of(bags))[0][f"t1/f2#{chunk}"].values()
            assert ids[-1] == placed(seed, "t1", chunk, 50)


def test_unified_joins_its_look_ups_in_order():
    tables = plain_tables(6)
    plan = Unified(num_buckets=50, num_chunks=3, num_tables=2)
    collection = CompressedEmbeddingBagCollection([t.bag() for t in tables], plan)
    first, second = collection.serving_tensors().values()
    batch = batch_of({"f0": [[1]], "f1": [[2]], "f2": [[3]]})
    rows = {key: int(j.values()[0]) for key, j in collection.route(batch)[0].to_dict().items()}
    # Look-ups are dealt to the tables in turn: as t0's name has it, 0 and 2 to the second table.
    parts = [second[rows["t0/f0#0"]], first[rows["t0/f0#1"]], second[rows["t0/f0#2"]]]
    torch.testing.assert_close(collection(batch)["f0"][0], torch.cat(parts))


def test_missing_features_are_named():
    collection = CompressedEmbeddingBagCollection([t.bag() for t in plain_tables()])
    with pytest.raises(ValueError, match="expected features f1, f2, .* it has f0"):
        collection(batch_of({"f0": [[1]]}))


def test_missing_weights_are_named():
    tables = plain_tables()
    collection = CompressedEmbeddingBagCollection([t.bag() for t in tables], is_weighted=True)
    with pytest.raises(ValueError, match="features carry no weights"):
        collection(random_batch(tables, seed=0))


def test_weights_are_ignored_by_an_unweighted_collection():
    tables = plain_tables()
    for case in CASES.values():
        collection = pooled(case, tables)
        weighted = random_batch(tables, seed=0, weighted=True)
        plain = KeyedJaggedTensor(
            keys=weighted.keys(), values=weighted.values(), lengths=weighted.lengths()
        )
        assert torch.equal(collection(weighted).values(), collection(plain).values())


def test_physical_names_that_clash_are_refused():
    def build(*names, plan):
        tables = [
            EmbeddingBagConfig(name=name, num_embeddings=60, embedding_dim=4, feature_names=[name])
            for name in names
        ]
        return CompressedEmbeddingBagCollection(tables, plan)

    one = Unified(num_buckets=5)
    (physical,) = (table.name for table in build("a", plan=one).physical_tables)
    with pytest.raises(ConfigError, match=f"{physical} clash"):
        build("a", physical, plan={"a": one})
    # What is shared is named by its settings, not by those of single tables.
    other = Unified(num_buckets=5, chunks={"b": 3})
    with pytest.raises(ConfigError, match=f"{physical} clash.* another seed"):
        build("a", "b", plan={"a": one, "b": other})
    build("a", "b", plan={"a": one, "b": dataclasses.replace(other, seed=1)})


def test_unpooled_tables_must_be_equally_wide():
    tables = [
        EmbeddingConfig(name=f"t{dim}", num_embeddings=9, embedding_dim=dim, feature_names=["f"])
        for dim in (4, 8)
    ]
    with pytest.raises(ConfigError, match=r"one embedding_dim, got \[4, 8\]"):
        CompressedEmbeddingCollection(tables)


@pytest.mark.parametrize("case", CASES)
def test_a_copied_collection_answers_alike(case):
    tables = awkward_tables()
    collection = pooled(CASES[case], tables)
    batch = random_batch(tables, seed=4)
    collection.train()(batch)  # a penalty may be left of it, with its graph
    collection.eval()
    wanted = collection(batch).values()
    assert torch.equal(copy.deepcopy(collection)(batch).values(), wanted)
