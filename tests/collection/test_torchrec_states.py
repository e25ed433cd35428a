"""Whole tables come from TorchRec's collections and go back, under its names and at its widths."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from embcomp import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from embcomp.backends import BACKENDS, PQ, DNISSearch, Full, Hash, LowDim, Matryoshka, OptEmbed
from embcomp.collection import torchrec_state_dict
from embcomp.errors import CheckpointError, ConfigError
from embcomp.tables.specs import specs_from_configs
from embcomp.testing.check_data import plain_tables, random_batch
from tests.helpers.backends_under_test import CASES

DIM = 10  # not a multiple of 4: what is trained is padded
TABLES = plain_tables(dim=DIM)
NAMES = [table.name for table in TABLES]
FEATURES = random_batch(TABLES, seed=0, batch_size=4)
# What a method in stages begins with holds whole tables, whatever it learns beside them; but for those
# that were asked to begin with narrow ones, and cce, which begins with hashed ones.
FIRST = {
    name: case.config.first_method()
    for name, case in CASES.items()
    if len(case.config.stages()) > 1 and getattr(case.config, "from_dense", True) and name != "cce"
} | {"matryoshka": Matryoshka(), "dnis_search": DNISSearch()}


def bags():
    return [table.bag() for table in TABLES]


def unpooled():
    return [table.unpooled() for table in TABLES]


def theirs(pooled, seed=1):
    torch.manual_seed(seed)
    return EmbeddingBagCollection(bags()) if pooled else EmbeddingCollection(unpooled())


def ours(pooled, plan=None, device=None):
    torch.manual_seed(2)
    if pooled:
        return CompressedEmbeddingBagCollection(bags(), plan, device=device)
    return CompressedEmbeddingCollection(unpooled(), plan, device=device)


def taken(pooled, plan=None, **settings):
    if pooled:
        made = CompressedEmbeddingBagCollection.from_embedding_bag_collection
    else:
        made = CompressedEmbeddingCollection.from_embedding_collection
    return made(theirs(pooled), plan, **settings)


def expect_same_answers(one, other):
    found, wanted = one(FEATURES), other(FEATURES)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        pairs = [(found[key].values(), wanted[key].values()) for key in wanted]
    else:
        assert found.keys() == wanted.keys()
        pairs = [(found.values(), wanted.values())]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def placed(pooled, module):
    """A model with a collection somewhere inside."""
    return nn.Sequential(nn.Identity(), nn.ModuleDict({"sparse": module}))


@pytest.mark.parametrize("inside", [False, True], ids=["bare", "in a model"])
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "unpooled"])
def test_a_torchrec_state_dict_loads_and_goes_back(pooled, inside):
    source, collection, back = theirs(pooled), ours(pooled), theirs(pooled, seed=3)
    wrap = placed if inside else lambda pooled, module: module
    state = wrap(pooled, source).state_dict()
    kept = dict(state)
    wrap(pooled, collection).load_state_dict(state)
    assert state.keys() == kept.keys()  # what is given is not changed
    expect_same_answers(collection, source)

    returned = torchrec_state_dict(wrap(pooled, collection))
    assert {k: v.shape for k, v in returned.items()} == {k: v.shape for k, v in state.items()}
    wrap(pooled, back).load_state_dict(returned)
    expect_same_answers(back, source)


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "unpooled"])
def test_padding_is_zero_whatever_was_there(pooled):
    collection = ours(pooled)
    collection.load_state_dict(theirs(pooled).state_dict())
    for name, weight in collection.state_dict().items():
        if name.endswith(".weight"):
            assert weight.shape[1] == 12
            assert not weight[:, DIM:].any()


def test_a_pooled_checkpoint_fills_an_unpooled_collection_and_the_other_way():
    for pooled in (True, False):
        collection, state = ours(pooled), theirs(not pooled).state_dict()
        collection.load_state_dict(state)
        assert [*torchrec_state_dict(collection)] != [*state]
        for found, wanted in zip(torchrec_state_dict(collection).values(), state.values()):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "unpooled"])
@pytest.mark.parametrize("first", FIRST)
def test_methods_in_stages_begin_with_torchrecs_rows(first, pooled):
    collection = taken(pooled, FIRST[first])
    returned = torchrec_state_dict(collection)
    for name, rows in theirs(pooled).state_dict().items():
        torch.testing.assert_close(returned[name], rows, rtol=0, atol=0)
    if FIRST[first] in (Full(), Matryoshka()):
        expect_same_answers(collection.eval(), theirs(pooled))


def test_all_kinds_of_beginnings_were_tried():
    assert {method.name for method in FIRST.values()} >= {"full", "optembed", "matryoshka"}


@pytest.mark.parametrize("case", CASES)
def test_a_method_that_says_so_stores_rows_as_torchrec_does(case):
    """A physical table of the table's name, rows and width, which alone answers for its ids."""
    config = CASES[case].config
    for table in specs_from_configs(bags()):
        if config.holds_whole(table) and not config.keeps_full(table):
            (physical,) = config.for_tables([table]).physical_tables([table])
            assert (physical.name, physical.num_embeddings) == (table.name, table.num_embeddings)
            assert physical.embedding_dim == table.embedding_dim
    assert config.name in BACKENDS


def test_whole_rows_are_low_dim_rows_of_full_width_alone():
    whole = taken(True, LowDim(width=DIM))
    expect_same_answers(whole, theirs(True))
    with pytest.raises(CheckpointError, match=f"cannot fill {NAMES[0]}, which is held by low_dim"):
        taken(True, LowDim(width=DIM, widths={NAMES[0]: 3}))
    with pytest.raises(CheckpointError, match=f"cannot fill {NAMES[1]}, which is held by low_dim"):
        taken(True, LowDim(width=DIM, kept={NAMES[1]: 5}))


def test_tables_that_are_not_held_whole_are_refused_by_name_or_start_anew():
    plan = {
        NAMES[0]: Hash(num_buckets=5, collisionless=0),
        NAMES[1]: PQ(subvector_dim=2, num_codewords=4),
    }
    with pytest.raises(CheckpointError, match=f"{NAMES[0]}, which is held by hash, {NAMES[1]}.*pq"):
        taken(True, plan)
    with pytest.warns(UserWarning, match=f"nothing is loaded of tables {NAMES[0]}, {NAMES[1]}:"):
        collection = taken(True, plan, strict=False)
    returned = torchrec_state_dict(collection)
    key = f"embedding_bags.{NAMES[2]}.weight"
    torch.testing.assert_close(returned[key], theirs(True).state_dict()[key], rtol=0, atol=0)
    assert f"embedding_bags.{NAMES[0]}.weight" not in returned
    other = ours(True, plan)
    other.load_state_dict(returned)  # what is not whole went under its own names
    expect_same_answers(other, collection)


def test_loading_nothing_of_a_table_warns_by_name():
    state = theirs(True).state_dict()
    del state[f"embedding_bags.{NAMES[0]}.weight"]
    inside, model = {f"1.sparse.{k}": v for k, v in state.items()}, placed(True, ours(True))
    with pytest.warns(UserWarning, match=rf"of table {NAMES[0]}: the .*'1\.sparse\.'"):
        model.load_state_dict(inside, strict=False)
    with pytest.warns(UserWarning, match="of tables t0, t1, t2:"):
        ours(True).load_state_dict({"elsewhere.weight": torch.zeros(1)}, strict=False)
    with (
        pytest.raises(RuntimeError, match=f"Missing key.*{NAMES[0]}"),
        pytest.warns(UserWarning, match=NAMES[0]),
    ):
        ours(True).load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(True).load_state_dict(theirs(True).state_dict(), strict=False)


def test_rows_of_another_size_are_refused_by_name():
    state = theirs(True).state_dict()
    state[f"embedding_bags.{NAMES[1]}.weight"] = torch.zeros(3, DIM)
    with pytest.raises(CheckpointError, match=f"table '{NAMES[1]}' cannot be taken over"):
        ours(True).load_state_dict(state)


def test_a_collection_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="TorchRec's EmbeddingBagCollection, .* got a Embedding"):
        CompressedEmbeddingBagCollection.from_embedding_bag_collection(theirs(False))


def test_settings_go_along():
    weighted = EmbeddingBagCollection(bags(), is_weighted=True, device=torch.device("meta"))
    collection = CompressedEmbeddingBagCollection.from_embedding_bag_collection(weighted.eval())
    assert collection.is_weighted() and not collection.training
    assert collection.device.type == "meta"
    indices = EmbeddingCollection(unpooled(), need_indices=True)
    assert CompressedEmbeddingCollection.from_embedding_collection(indices).need_indices()


@pytest.mark.parametrize("method", [OptEmbed(), DNISSearch()], ids=lambda method: method.name)
def test_what_was_learnt_before_stays_when_rows_come(method):
    collection = ours(True, method)
    with torch.no_grad():
        for parameter in collection.combine.parameters():
            parameter.uniform_(0.1, 0.2)
    learnt = {k: v.clone() for k, v in collection.combine.state_dict().items()}
    collection.load_state_dict(theirs(True).state_dict())
    for name, value in collection.combine.state_dict().items():
        torch.testing.assert_close(value, learnt[name], rtol=0, atol=0)
