"""A table is known by its name: saved in one company, it answers in another as it did, or is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import embcomp
from embcomp import CompressedEmbeddingBagCollection
from embcomp.backends import PQ, Coded, Full, Hash, LowDim, LowRank, Unified
from embcomp.backends.base import StageInputs
from embcomp.errors import ArtefactError, CheckpointError, ConfigError
from embcomp.serving.artefact_config import CONFIG_FILE
from embcomp.testing.cases import embed_ids
from tests.helpers.backends_under_test import CASES
from tests.helpers.identity_cases import CHANGES, TABLES, TRAINED, collection_of, learn, shared

# Codewords and projections that tables share have one size for all; a table that joins or leaves
# changes nothing of it here, as all tables are equally wide.
EVERY = [(case, change) for case in CASES for change in CHANGES]


def answers(collection, names):
    return embed_ids(collection, [TABLES[name] for name in names])


def expect_same_answers(found, wanted, names):
    """Each shared table's every id answers as it did, but for how BLAS rounds products of other shapes."""
    keys = [feature for name in shared(names) for feature in TABLES[name].features]
    assert keys
    for key in keys:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-6, atol=1e-7)


def trained(case):
    collection = collection_of(case, TRAINED, seed=1)
    learn(collection)
    return collection, answers(collection, TRAINED)


def test_each_method_has_learnt_what_another_company_would_spoil():
    """What `learn` changes shows in the answers, or these tests could not fail."""
    for case in CASES:
        _, found = trained(case)
        fresh = answers(collection_of(case, TRAINED, seed=1), TRAINED)
        for key, rows in found.items():
            assert not torch.equal(rows, fresh[key]), (case, key)


@pytest.mark.parametrize(("case", "change"), EVERY)
def test_state_dicts_load_by_name(case, change):
    collection, wanted = trained(case)
    names = CHANGES[change]
    other = collection_of(case, names, seed=2)
    state = collection.state_dict()
    if set(names) == set(TRAINED):
        other.load_state_dict(state)
    else:
        odd = sorted(set(names) ^ set(TRAINED))
        with pytest.raises(RuntimeError, match=f"table@{odd[0]}"):
            other.load_state_dict(state)
        other = collection_of(case, names, seed=2)
        other.load_state_dict(state, strict=False)
    expect_same_answers(answers(other, names), wanted, names)


@pytest.mark.parametrize(("case", "change"), EVERY)
def test_distributed_checkpoints_load_by_name(case, change, tmp_path):
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    collection, wanted = trained(case)
    names = CHANGES[change]
    dcp.save({"model": collection.state_dict()}, checkpoint_id=str(tmp_path), no_dist=True)
    other = collection_of(case, names, seed=2)
    state = {"model": other.state_dict()}
    added = sorted(set(names) - set(TRAINED))
    if added:
        with pytest.raises(CheckpointException, match=f"table@{added[0]}"):
            dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True, planner=planner)
    else:
        dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    other.load_state_dict(state["model"])
    expect_same_answers(answers(other, names), wanted, names)


def rewrite(folder, target, names):
    """An artefact whose description has been edited by hand: other tables, in another order."""
    shutil.copytree(folder, target)
    config = json.loads((target / CONFIG_FILE).read_text())
    record = config["tables"]
    known = {table["name"]: table for table in record["tables"]}
    pattern = record["tables"][0]
    record["tables"] = [
        known.get(name) or {**pattern, "name": name, "feature_names": list(TABLES[name].features)}
        for name in names
    ]
    for entry in record["plan"]:
        entry["tables"] = [name for name in entry["tables"] if name in names]
    record["plan"] = [entry for entry in record["plan"] if entry["tables"]]
    record["plan"][-1]["tables"] += [name for name in names if name not in TRAINED]
    (target / CONFIG_FILE).write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(("case", "change"), EVERY)
def test_artefacts_load_by_name(case, change, tmp_path):
    collection, _ = trained(case)
    names = CHANGES[change]
    saved = embcomp.save(collection.compact(), tmp_path / "saved")
    wanted = answers(collection, TRAINED)
    edited = rewrite(saved.path, tmp_path / "edited", names)
    odd = sorted(set(names) ^ set(TRAINED))
    try:
        loaded = embcomp.load(edited, rows="torch", verify=False)
    except (ArtefactError, ConfigError) as error:
        assert odd, error
        assert any(name in str(error) for name in odd), error
        return
    found = answers(loaded, names)
    keys = [feature for name in shared(names) for feature in TABLES[name].features]
    for key in keys:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_tables_changes_nothing_that_is_stored(case):
    """Names, shapes and values: also what is drawn and hashed before anything is learnt."""
    one, other = (collection_of(case, names, seed=1) for names in (TRAINED, CHANGES["reordered"]))
    here, there = one.state_dict(), other.state_dict()
    assert {n: t.shape for n, t in here.items()} == {n: t.shape for n, t in there.items()}
    for name, tensor in here.items():
        if "embedding_bags" not in name and tensor.requires_grad is False:
            torch.testing.assert_close(there[name], tensor, rtol=0, atol=0)


def test_a_table_is_added_to_a_trained_unified_of_fixed_size():
    for num_tables in (1, 2):
        method = Unified(num_buckets=50, num_chunks=3, num_tables=num_tables)
        collection = collection_of("unified", TRAINED, seed=1, method=method)
        names = CHANGES["inserted"]
        other = collection_of("unified", names, seed=2, method=method)
        other.load_state_dict(collection.state_dict(), strict=False)
        wanted = answers(collection, TRAINED)
        expect_same_answers(answers(other, names), wanted, names)


def test_features_of_one_table_share_its_rows():
    """However many look-ups there are, and however many physical tables they are dealt to."""
    for method in (
        Hash(num_buckets=40, collisionless=0),
        Unified(num_buckets=50, num_chunks=3, num_tables=2),
        Unified(num_buckets=50, num_chunks=2, num_tables=3),
        Coded(subvector_dim=2, num_codewords=16),
    ):
        found = answers(collection_of("unified", TRAINED, seed=1, method=method), TRAINED)
        assert torch.equal(found["f0"], found["f1"])


def test_shared_rows_of_another_size_are_refused_by_name():
    collection = collection_of("unified", TRAINED, seed=1)
    smaller = dataclasses.replace(CASES["unified"].config, num_buckets=60)
    other = collection_of("unified", CHANGES["appended"], seed=2, method=smaller)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match="table 't0' .* only the collection has z") as e:
            other.load_state_dict(collection.state_dict(), strict=strict)
        assert "is missing" in str(e.value)


def test_codewords_that_shrink_with_a_table_that_left_are_refused_by_name():
    wide = dataclasses.replace(TABLES["t2"], dim=20)
    method = Coded(subvector_dim=5, num_codewords=8)
    torch.manual_seed(1)
    tables = [TABLES["t0"].bag(), TABLES["t1"].bag(), wide.bag()]
    state = CompressedEmbeddingBagCollection(tables, method).state_dict()
    other = CompressedEmbeddingBagCollection(tables[:2], method)
    complaint = "table 't0' .* is 32 x 8 there and 16 x 8 here; only the state has t2 beside it"
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=complaint):
            other.load_state_dict(state, strict=strict)


def test_a_table_is_loaded_whole_or_not_at_all():
    """Rows without their codes, their directory or their thresholds would answer wrongly."""
    for case in ("coded", "low_dim_kept", "optembed", "dnis_search", "lr2vq_table", "sparse"):
        collection, _ = trained(case)
        state = collection.state_dict()
        learnt = [name for name in state if name.endswith("@t1") and "table@" not in name]
        assert learnt, case
        for name in learnt:
            part = {key: value for key, value in state.items() if key != name}
            with pytest.raises(CheckpointError, match="table 't1' cannot be taken over"):
                collection_of(case, TRAINED, seed=2).load_state_dict(part, strict=False)


def test_states_that_do_not_name_their_tables_are_refused():
    collection = collection_of("hash", TRAINED, seed=1)
    state = {key: v for key, v in collection.state_dict().items() if "table@" not in key}
    for strict in (True, False):
        with pytest.raises(CheckpointError, match="an earlier embcomp wrote it"):
            collection.load_state_dict(state, strict=strict)


def test_a_model_is_loaded_without_its_tables():
    model = torch.nn.ModuleDict(
        {"tables": collection_of("hash", TRAINED, seed=1), "dense": torch.nn.Linear(2, 1)}
    )
    dense = {k: torch.ones_like(v) for k, v in model.state_dict().items() if "dense" in k}
    model.load_state_dict(dense, strict=False)
    assert bool((model["dense"].weight == 1).all())


def test_methods_beside_each_other_keep_their_tables_apart():
    """Which tables another method holds, or whether there is one, is no matter."""
    plan = {"t0": LowDim(width=4, kept={"t0": 20}), "t1": LowDim(width=6, kept={"t1": 30})}
    plan |= {"t2": Hash(num_buckets=40, collisionless=0)}

    def build(names, seed):
        torch.manual_seed(seed)
        tables = [TABLES[name].bag() for name in names]
        own = {name: plan[name] for name in names if name in plan}
        return CompressedEmbeddingBagCollection(tables, own).eval()

    one = build(TRAINED, 1)
    learn(one)
    wanted = answers(one, TRAINED)
    other = build(CHANGES["reordered"], 2)
    other.load_state_dict(one.state_dict())
    expect_same_answers(answers(other, TRAINED), wanted, TRAINED)
    more = build(("z", "t2", "t1", "a", "t0"), 2)
    more.load_state_dict(one.state_dict(), strict=False)
    expect_same_answers(answers(more, ("z", "t2", "t1", "a", "t0")), wanted, TRAINED)
    with pytest.raises(CheckpointError, match="table 't0' cannot be taken over"):
        build(("t0", "t2"), 2).load_state_dict(one.state_dict(), strict=False)  # another label


def test_two_tables_of_one_name_are_refused():
    tables = [TABLES["t0"].bag(), TABLES["t0"].bag()]
    for method in (Full(), Unified(num_buckets=9)):
        with pytest.raises(ConfigError, match="table names must be unique, got twice: t0"):
            CompressedEmbeddingBagCollection(tables, method)


def test_names_that_python_has_uses_for_are_tables_like_others():
    """Those that TorchRec can hold itself, and in shared rows any."""
    table = dataclasses.replace(TABLES["t0"], name="items", features=("f0",))
    method = Unified(num_buckets=20, chunks={"items": 3})
    collection = CompressedEmbeddingBagCollection([table.bag(), TABLES["t1"].bag()], method)
    other = CompressedEmbeddingBagCollection([TABLES["t1"].bag(), table.bag()], method)
    other.load_state_dict(collection.state_dict())
    found, wanted = (embed_ids(c.eval(), [table, TABLES["t1"]]) for c in (other, collection))
    assert torch.equal(found["f0"], wanted["f0"])


def test_safetensors_take_a_state_dict_in_parts():
    collection, _ = trained("coded")
    state = safetensors.torch.load(safetensors.torch.save(collection.state_dict()))
    other = collection_of("coded", CHANGES["reordered"], seed=2)
    other.load_state_dict(state)
    assert {name for name in state if "codes@" in name} == {
        f"route.routes.coded.codes@{name}" for name in TRAINED
    }


@pytest.mark.parametrize("method", [PQ(subvector_dim=5, num_codewords=8), LowRank(latent_dim=3)])
def test_stages_begin_alike_whatever_order_their_tables_come_in(method):
    full = collection_of("full", TRAINED, seed=1)
    tables, past = full.plan.tables, StageInputs(before=full.states()[0].form, initial=lambda: None)
    one, other = (method.start_stage(method.stages()[1], t, past) for t in (tables, tables[::-1]))
    assert one.config == other.config
    for name, tensor in one.tensors.items():
        assert torch.equal(other.tensors[name], tensor), name


@pytest.mark.parametrize("case", ["dnis_search", "dnis", "optembed", "matryoshka", "lr2vq_table"])
def test_serving_forms_are_alike_whatever_order_their_tables_come_in(case):
    collection, _ = trained(case)
    tables, form = collection.plan.tables, collection.states()[0].form
    one, other = (form.config.compact(given, form) for given in (tables, tables[::-1]))
    assert one.config == other.config
    for name, tensor in one.tensors.items():
        assert torch.equal(other.tensors[name], tensor), name
