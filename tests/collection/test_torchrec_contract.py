"""What TorchRec's own tests ask of its collections, and of models around them, asked of ours too.

Each check runs on both: what TorchRec's collection does, ours does, with the same weights. TorchRec's wheel
has none of its tests of these modules, so the checks are put here in words of our own.
"""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torchrec.fx import symbolic_trace
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from embcomp.backends import Hash, Matryoshka, Unified
from embcomp.errors import ConfigError
from embcomp.testing.cases import learning
from embcomp.testing.check_data import plain_tables, random_batch
from tests.helpers.backends_under_test import CASES

META = torch.device("meta")
KINDS = {
    "pooled": (EmbeddingBagCollection, CompressedEmbeddingBagCollection, EmbeddingBagConfig),
    "unpooled": (EmbeddingCollection, CompressedEmbeddingCollection, EmbeddingConfig),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def table(kind, name, features, dim=4, **settings):
    return KINDS[kind][2](
        name=name, embedding_dim=dim, num_embeddings=10, feature_names=features, **settings
    )


def both(kind, tables, plan=None, **settings):
    """TorchRec's collection, and ours with its rows."""
    theirs, ours, _ = KINDS[kind]
    torch.manual_seed(0)
    one = theirs(copy.deepcopy(tables), **settings)
    other = ours(copy.deepcopy(tables), plan, **settings)
    if one.state_dict() and other.device.type != "meta":
        other.load_state_dict(one.state_dict())
    return one, other


def batch(keys=("f1", "f2"), *, weighted=False, device=None, **changed):
    lengths = torch.tensor([2, 0, 1, 1, 1, 3][: 3 * len(keys)])
    lengths = torch.cat([lengths, torch.ones(3 * len(keys) - len(lengths), dtype=torch.int64)])
    values = torch.arange(int(lengths.sum())) % 10
    weights = torch.linspace(0.1, 2, len(values)) if weighted else None
    settings = {"keys": list(keys), "values": values, "lengths": lengths, "weights": weights}
    features = KeyedJaggedTensor(**(settings | changed))
    return features if device is None else features.to(device)


def expect_same(found, wanted):
    """Keys in order, widths, bags and values."""
    assert list(found.keys()) == list(wanted.keys())
    if isinstance(wanted, dict):
        for key, one in wanted.items():
            torch.testing.assert_close(found[key].values(), one.values())
            assert torch.equal(found[key].lengths(), one.lengths())
            if one.weights_or_none() is not None:
                assert torch.equal(found[key].weights(), one.weights())
        return
    assert found.length_per_key() == wanted.length_per_key()
    assert found.offset_per_key() == wanted.offset_per_key()
    torch.testing.assert_close(found.values(), wanted.values())


# --- look-ups -------------------------------------------------------------------------------------

LAYOUTS = {
    "two tables": [("t1", ["f1"], 4), ("t2", ["f2"], 4)],
    "a table of two features": [("t1", ["f1", "f2"], 4)],
    "a feature of two tables": [("t1", ["f1", "f2"], 4), ("t2", ["f1"], 4)],
    "a feature twice in a table": [("t1", ["f1", "f1"], 4), ("t2", ["f2"], 4)],
    "a feature twice in a table and in another": [("t1", ["f1", "f1"], 4), ("t2", ["f1"], 4)],
    "padded rows": [("t1", ["f1"], 3), ("t2", ["f2"], 3)],
    "tables out of order": [("t2", ["f2"], 4), ("t1", ["f1"], 4)],
    "a table that is its feature": [("f1", [], 4)],
}


@each_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_look_ups_answer_as_torchrecs(kind, layout):
    tables = [table(kind, *each) for each in LAYOUTS[layout]]
    for settings in [{}] if kind == "pooled" else [{}, {"need_indices": True}]:
        theirs, ours = both(kind, tables, **settings)
        expect_same(ours(batch()), theirs(batch()))
        expect_same(ours(batch(("f2", "f3", "f1"))), theirs(batch(("f2", "f3", "f1"))))
        if kind == "unpooled":
            assert ours.embedding_names_by_table() == theirs.embedding_names_by_table()


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_pooling_answers_as_torchrecs(pooling):
    tables = [
        table("pooled", "t1", ["f1", "f2"], 3, pooling=pooling),
        table("pooled", "t2", ["f1"]),
    ]
    theirs, ours = both("pooled", tables)
    expect_same(ours(batch()), theirs(batch()))


def test_weighted_bags_answer_as_torchrecs():
    tables = [table("pooled", "t1", ["f1", "f3"], 3), table("pooled", "t2", ["f2"])]
    theirs, ours = both("pooled", tables, is_weighted=True)
    features = batch(("f1", "f3", "f2"), weighted=True)
    expect_same(ours(features), theirs(features))
    assert ours.is_weighted() and theirs.is_weighted()


@each_kind
def test_weights_of_a_batch_are_ignored_by_a_collection_without(kind):
    theirs, ours = both(kind, [table(kind, "t1", ["f1", "f2"])])
    expect_same(ours(batch(weighted=True)), theirs(batch(weighted=True)))
    expect_same(ours(batch(weighted=True)), ours(batch()))


@each_kind
def test_tables_of_one_name_are_refused_as_by_torchrec(kind):
    for make in KINDS[kind][:2]:
        with pytest.raises(ValueError, match="t1"):
            make([table(kind, "t1", ["f1"]), table(kind, "t1", ["f2"])])


@each_kind
def test_a_collection_without_tables_can_be_made_and_asked(kind):
    theirs, ours = both(kind, [])
    configs = "embedding_bag_configs" if kind == "pooled" else "embedding_configs"
    assert getattr(ours, configs)() == getattr(theirs, configs)() == []
    assert not ours.state_dict() and not list(ours.parameters())
    assert ours.plan.compression_ratio == 1 and ours.footprint.serve_bytes == 0
    found = ours(batch())
    assert found == {} if kind == "unpooled" else found.values().shape == (3, 0)


@pytest.mark.parametrize("model", [SimpleDeepFMNN, DLRM])
def test_models_refuse_a_collection_without_tables_as_they_do_torchrecs(model):
    settings = (
        {"num_dense_features": 10, "hidden_layer_size": 20, "deep_fm_dimension": 5}
        if model is SimpleDeepFMNN
        else {"dense_in_features": 10, "dense_arch_layer_sizes": [4], "over_arch_layer_sizes": [1]}
    )
    for collection in both("pooled", []):
        with pytest.raises(AssertionError):
            model(embedding_bag_collection=collection, **settings)


# --- devices --------------------------------------------------------------------------------------


@each_kind
def test_the_device_is_what_was_asked_or_what_stands_around(kind):
    tables = [table(kind, "t1", ["f1"])]
    view = "embedding_bags" if kind == "pooled" else "embeddings"
    for collection in both(kind, tables, device=META):
        assert collection.device == getattr(collection, view)["t1"].weight.device == META
    for make in KINDS[kind][:2]:
        with META:
            collection = make(copy.deepcopy(tables))
        assert getattr(collection, view)["t1"].weight.device == META
        collection = make(copy.deepcopy(tables))
        assert collection.device == torch.device("cpu")
    with META:
        assert KINDS[kind][1](copy.deepcopy(tables)).device == META


@each_kind
@pytest.mark.parametrize("case", CASES)
def test_a_meta_batch_has_the_answers_shape(kind, case):
    tables = plain_tables(dim=16)
    configs = [t.bag() if kind == "pooled" else t.unpooled() for t in tables]
    collection = KINDS[kind][1](configs, CASES[case].config, device=META).eval()
    found = collection(random_batch(tables, seed=0, batch_size=4).to(META))
    if kind == "pooled":
        assert found.values().shape == (4, 48) and found.values().device == META
        assert found.keys() == ["f0", "f1", "f2"] and found.offset_per_key() == [0, 16, 32, 48]
    else:
        assert {key: one.values().shape[1] for key, one in found.items()} == dict.fromkeys(
            ["f0", "f1", "f2"], 16
        )


# --- tables to look at ----------------------------------------------------------------------------


@each_kind
def test_whole_tables_are_shown_as_torchrecs_are(kind):
    view = "embedding_bags" if kind == "pooled" else "embeddings"
    theirs, ours = both(kind, [table(kind, "t1", ["f1"], 3), table(kind, "t2", ["f2"], 3)])
    shown, wanted = getattr(ours, view), getattr(theirs, view)
    assert list(shown) == list(wanted) and len(shown) == 2 and "t1" in shown
    for name, one in wanted.items():
        assert torch.equal(shown[name].weight, one.weight)
        assert shown[name].num_embeddings == one.num_embeddings
        assert shown[name].embedding_dim == one.embedding_dim
        assert not shown[name].weight.requires_grad
    with torch.no_grad():  # a view: what training changes is seen
        next(iter(ours.parameters())).add_(1)
    assert not torch.equal(shown["t1"].weight, wanted["t1"].weight)


def test_a_table_without_rows_of_its_own_is_not_shown():
    tables = [table("pooled", "t1", ["f1"]), table("pooled", "t2", ["f2"])]
    ours = CompressedEmbeddingBagCollection(tables, {"t1": Hash(num_buckets=3, collisionless=0)})
    assert list(ours.embedding_bags) == ["t2"]
    with pytest.raises(KeyError, match="'t1' has no row for each id to show: it is held by hash"):
        ours.embedding_bags["t1"]
    with pytest.raises(KeyError, match="t9"):
        ours.embedding_bags["t9"]


def test_asking_for_views_of_what_is_not_there_is_no_error_before_one_is_read():
    ours = CompressedEmbeddingBagCollection([table("pooled", "t1", ["f1"])])
    ours.rows = nn.Identity()  # as where TorchRec put a sharded, or a quantised, collection
    assert hasattr(ours, "embedding_bags") and list(ours.embedding_bags) == ["t1"]
    with pytest.raises(TypeError, match="expected an unsharded collection"):
        ours.embedding_bags["t1"]


# --- tracing and scripting ------------------------------------------------------------------------


def scripted(module):
    """Compiled, saved and loaded."""
    compiled = torch.jit.script(module)
    buffer = io.BytesIO()
    torch.jit.save(compiled, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("layout", ["padded rows"])
def test_a_collection_is_traced_and_scripted_as_torchrecs(kind, layout):
    tables = [table(kind, *each) for each in LAYOUTS[layout]]
    if kind == "pooled":
        tables[0].pooling = PoolingType.MEAN
    theirs, ours = both(kind, tables, **({} if kind == "pooled" else {"need_indices": True}))
    wanted, before = theirs(batch()), list(ours.state_dict())
    traced = symbolic_trace(ours)
    expect_same(traced(batch()), wanted)
    expect_same(scripted(ours)(batch()), wanted)
    expect_same(scripted(traced)(batch()), wanted)
    expect_same(traced(features=batch()), wanted)  # also after it was scripted
    expect_same(ours(batch()), wanted)
    assert list(ours.state_dict()) == before


@pytest.mark.slow
def test_weighted_look_ups_are_scripted():
    tables = [table("pooled", "t1", ["f1", "f3"], 3), table("pooled", "t2", ["f2"])]
    theirs, ours = both("pooled", tables, is_weighted=True)
    features = batch(("f1", "f3", "f2"), weighted=True)
    expect_same(scripted(symbolic_trace(ours))(features), theirs(features))


def test_scripted_look_ups_refuse_what_others_refuse():
    _, ours = both("pooled", [table("pooled", "t1", ["f1"])])
    compiled = torch.jit.script(ours)
    with pytest.raises(torch.jit.Error, match=r"an id of feature f1 is not in \[0, 10\)"):
        compiled(batch(values=torch.full((8,), 10)))
    with pytest.raises(torch.jit.Error, match="expected feature f1, which the batch lacks"):
        compiled(batch(("f3", "f2")))


@pytest.mark.parametrize("method", [Hash(num_buckets=3, collisionless=0), Matryoshka()])
def test_methods_that_torchscript_cannot_compile_are_refused_by_name(method):
    _, ours = both("pooled", [], None)
    ours = CompressedEmbeddingBagCollection([table("pooled", "t1", ["f1"])], method)
    for module in (ours, symbolic_trace(ours)):
        with pytest.raises(ConfigError, match=f"look-ups of t1, which {method.name} holds"):
            torch.jit.script(module)


@each_kind
@pytest.mark.parametrize("case", CASES)
def test_every_method_is_traced(kind, case):
    tables = plain_tables(dim=16)
    configs = [t.bag() if kind == "pooled" else t.unpooled() for t in tables]
    collection = KINDS[kind][1](configs, CASES[case].config).eval()
    features = random_batch(tables, seed=0, batch_size=4)
    traced = symbolic_trace(collection)
    wanted = collection(features)  # which looks some methods up key by key, as a graph never does
    expect_same(traced(features), wanted)


def deepfm(collection):
    torch.manual_seed(0)
    return SimpleDeepFMNN(
        num_dense_features=10,
        embedding_bag_collection=collection,
        hidden_layer_size=20,
        deep_fm_dimension=5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("plan", [None, Unified(num_buckets=7)], ids=["full", "unified"])
def test_deepfm_runs_and_is_traced(plan):
    tables = [table("pooled", "t1", ["f1", "f3"]), table("pooled", "t2", ["f2"])]
    ours = deepfm(CompressedEmbeddingBagCollection(tables, plan))
    features, dense = batch(("f1", "f3", "f2")), torch.rand(3, 10)
    wanted = ours(dense_features=dense, sparse_features=features)
    assert wanted.shape == (3, 1)
    traced = symbolic_trace(ours)
    assert all(word in traced.code for word in ("KeyedJaggedTensor", "cat", "f2"))
    torch.testing.assert_close(traced(dense, features), wanted)
    if plan is None:
        torch.testing.assert_close(torch.jit.script(traced)(dense, features), wanted)
        theirs = deepfm(EmbeddingBagCollection(tables))
        theirs.load_state_dict(
            {
                k.replace("rows.embedding_bags", "embedding_bags"): v
                for k, v in ours.state_dict().items()
                if "table@" not in k
            }
        )
        torch.testing.assert_close(theirs(dense, features), wanted)


# --- batches of other shapes ----------------------------------------------------------------------


def deduplicated(kind=None, *, weighted=False, equal=False):
    """Two bags of f1 and three of f2 (or two) for a batch of four rows, and that batch."""
    lengths = torch.tensor([2, 1, 1, 3] if equal else [2, 1, 1, 0, 3])
    values = torch.arange(7)
    weights = torch.linspace(0.1, 2, 7) if weighted else None
    second = [1, 1, 0, 1] if equal else [2, 1, 0, 0]
    inverse = (["f2", "f1"], torch.tensor([second, [0, 1, 0, 1]]))
    strides = {} if equal else {"stride_per_key_per_rank": [[2], [3]]}
    return KeyedJaggedTensor(
        keys=["f1", "f2"],
        values=values,
        lengths=lengths,
        weights=weights,
        inverse_indices=None if kind == "unpooled" else inverse,
        **strides,
    )


@each_kind
@pytest.mark.parametrize("equal", [False, True], ids=["own strides", "one stride"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deduplicated_batches_answer_as_torchrecs(kind, layout, equal):
    tables = [table(kind, *each) for each in LAYOUTS[layout]]
    theirs, ours = both(kind, tables)
    features = partial(deduplicated, kind, equal=equal)
    expect_same(ours(features()), theirs(features()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("equal", [False, True], ids=["own strides", "one stride"])
def test_every_method_answers_a_deduplicated_batch_as_the_batch_itself(case, equal):
    tables = [t.bag() for t in plain_tables(dim=16, rows=(60, 90, 75))]
    for each, feature in zip(tables, ("f1", "f2", "f2")):
        each.feature_names = [feature]
    for weighted in (False, True):
        ours = CompressedEmbeddingBagCollection(tables, CASES[case].config, is_weighted=weighted)
        short = deduplicated(weighted=weighted, equal=equal)
        rows = [("f1", n) for n in (0, 1, 0, 1)]
        rows += [("f2", n) for n in ((1, 1, 0, 1) if equal else (2, 1, 0, 0))]
        bags = short.to_dict()
        picked = {name: list(zip(*_bags(bags[name]))) for name in bags}
        chosen = [picked[name][n] for name, n in rows]
        plain = KeyedJaggedTensor(
            keys=["f1", "f2"],
            values=torch.cat([ids for ids, _ in chosen]),
            weights=torch.cat([weights for _, weights in chosen]) if weighted else None,
            lengths=torch.tensor([len(ids) for ids, _ in chosen]),
        )
        ours.eval()
        expect_same(ours(short), ours(plain))


def _bags(jagged):
    lengths = jagged.lengths().tolist()
    weights = jagged.weights_or_none()
    ids = jagged.values().split(lengths)
    return ids, ids if weights is None else weights.split(lengths)


def test_bags_that_belong_to_no_row_are_refused():
    _, ours = both("pooled", [table("pooled", "t1", ["f1", "f2"])])
    ragged = batch(stride_per_key_per_rank=[[2], [4]])
    with pytest.raises(ValueError, match="same number of bags for every feature.*got f1 2, f2 4"):
        ours(ragged)
    unknown = batch(inverse_indices=(["f1"], torch.zeros(1, 3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="inverse_indices say nothing of f2; they have f1"):
        ours(unknown)


NOTHING = {
    "values": torch.empty(0, dtype=torch.int64),
    "lengths": torch.empty(0, dtype=torch.int64),
}


@each_kind
@pytest.mark.parametrize("case", CASES)
def test_a_batch_without_rows_has_an_answer_without_rows(kind, case):
    tables = plain_tables(dim=16)
    configs = [t.bag() if kind == "pooled" else t.unpooled() for t in tables]
    collection = KINDS[kind][1](configs, CASES[case].config)
    for keys in (["f0", "f1", "f2"], ["f2", "f0", "f1", "f9"]):
        found = collection(KeyedJaggedTensor(keys=keys, **NOTHING))
        if kind == "pooled":
            assert found.values().shape == (0, 48) and found.keys() == ["f0", "f1", "f2"]
        else:
            shapes = {key: tuple(one.values().shape) for key, one in found.items()}
            assert shapes == dict.fromkeys(["f0", "f1", "f2"], (0, 16))
            assert all(not one.lengths().numel() for one in found.values())


@each_kind
def test_no_rows_in_torchrecs_own_form_answer_as_torchrecs(kind):
    theirs, ours = both(kind, [table(kind, "t1", ["f1", "f2"])])
    features = KeyedJaggedTensor(keys=["f1", "f2"], stride_per_key_per_rank=[[0], [0]], **NOTHING)
    expect_same(ours(features), theirs(features))


# --- copies and programs --------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_copy_answers_the_same_and_is_trained_alone(case):
    tables = plain_tables(dim=16)
    collection = CompressedEmbeddingBagCollection([t.bag() for t in tables], CASES[case].config)
    learning(collection)
    features = random_batch(tables, seed=0, batch_size=4)
    answer = collection(features).values()  # in training mode, with whatever it leaves behind
    if answer.requires_grad:
        answer.sum().backward()
    collection.settle()  # what a step leaves for the next is no part of a copy
    collection.eval()
    copied = copy.deepcopy(collection)
    expect_same(copied(features), collection(features))
    wanted = collection(features).values().clone()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    torch.testing.assert_close(collection(features).values(), wanted, rtol=0, atol=0)


class Around(nn.Module):
    """A module that makes the features of tensors."""

    def __init__(self, collection):
        super().__init__()
        self.collection = collection
        self.head = nn.Linear(48, 1)

    def forward(self, values, lengths):
        features = KeyedJaggedTensor(keys=["f0", "f1", "f2"], values=values, lengths=lengths)
        return self.head(self.collection(features).values())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", "coded"])
def test_a_module_around_the_collection_is_exported(case):
    tables = plain_tables(dim=16)
    collection = CompressedEmbeddingBagCollection([t.bag() for t in tables], CASES[case].config)
    model = Around(collection).eval()
    one, other = (random_batch(tables, seed=seed, batch_size=4) for seed in (0, 3))
    free = ({0: torch.export.Dim.DYNAMIC}, {0: None})
    inputs = (one.values(), one.lengths())
    if case == "coded":
        with pytest.raises(
            ValueError, match="filled before they are exported; call the model once"
        ):
            torch.export.export(model, inputs, dynamic_shapes=free, strict=False)
        model(*inputs)
    program = torch.export.export(model, inputs, dynamic_shapes=free, strict=False).module()
    for features in (one, other):
        found = program(features.values(), features.lengths())
        torch.testing.assert_close(found, model(features.values(), features.lengths()))
