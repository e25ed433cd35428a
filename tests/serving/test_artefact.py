"""Saved collections and models: the same answers from exactly the bytes that were predicted."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torchrec.models.dlrm import DLRM

from embcomp import Full, Hash, Plan, load, save
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.errors import ArtefactError, BudgetError, ConfigError, DataError
from embcomp.serving.artefact_folder import header_bytes
from embcomp.tables.footprint import count_bytes
from embcomp.tables.row_types import ROW_TYPES, served_footprint, unpack
from embcomp.testing.cases import embed_ids, pooled, unpooled
from embcomp.testing.check_data import awkward_tables, plain_tables, random_batch
from tests.helpers.backends_under_test import CASES, EACH_METHOD
from tests.helpers.long import long_but

pytestmark = pytest.mark.slow

AWKWARD = (10, 6, 3)


@pytest.fixture
def saved(tmp_path):
    """A small collection of two methods and its artefact."""
    tables = awkward_tables((8, 8, 8))
    torch.manual_seed(0)
    plan = Plan(default=Hash(num_buckets=20, collisionless=0), overrides={"t1": Full()})
    collection = CompressedEmbeddingBagCollection([t.bag() for t in tables], plan).eval()
    save(collection, tmp_path / "artefact")
    return tables, collection, tmp_path / "artefact"


@pytest.mark.parametrize("rows", ["auto", "fbgemm", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_an_artefact_answers_as_what_was_saved(case, rows, tmp_path):
    tables = awkward_tables(AWKWARD)
    collection = pooled(CASES[case], tables)
    save(collection, tmp_path / "a")
    serving = load(tmp_path / "a", rows=rows)
    mapped = load(tmp_path / "a", rows=rows, mmap=True)
    for shape in ("single", "ragged", "empty"):
        batch = random_batch(tables, seed=3, shape=shape)
        wanted, found = collection(batch), serving(batch)
        assert list(found.keys()) == list(wanted.keys())
        assert found.length_per_key() == wanted.length_per_key()
        torch.testing.assert_close(found.values(), wanted.values(), rtol=1e-5, atol=1e-6)
        assert torch.equal(mapped(batch).values(), found.values())
    there = embed_ids(serving, tables)
    for key, embeddings in embed_ids(collection, tables).items():
        torch.testing.assert_close(there[key], embeddings, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_unpooled_and_weighted_artefacts_answer_too(case, tmp_path):
    tables = awkward_tables((8, 8, 8))
    rows = unpooled(CASES[case], tables, need_indices=True)
    save(rows, tmp_path / "unpooled")
    batch = random_batch(tables, seed=4)
    found = load(tmp_path / "unpooled")(batch)
    wanted = rows(batch)
    assert list(found) == list(wanted)
    for key, jagged in wanted.items():
        torch.testing.assert_close(found[key].values(), jagged.values(), rtol=1e-5, atol=1e-6)
        assert torch.equal(found[key].weights(), jagged.weights())
    weighted = pooled(CASES[case], tables, is_weighted=True)
    save(weighted, tmp_path / "weighted")
    batch = random_batch(tables, seed=5, weighted=True)
    for kernel in ("auto", "fbgemm", "torch"):
        serving = load(tmp_path / "weighted", rows=kernel)
        torch.testing.assert_close(
            serving(batch).values(), weighted(batch).values(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("case", EACH_METHOD)
def test_pickles_answer_the_same(case, tmp_path):
    tables = awkward_tables((8, 6, 3))
    trained, batch = pooled(CASES[case], tables), random_batch(tables, seed=3)
    save(trained, tmp_path / "a")
    for model in (trained, load(tmp_path / "a")):
        copied = pickle.loads(pickle.dumps(model))
        assert torch.equal(copied(batch).values(), model(batch).values())


@pytest.mark.parametrize("dims", long_but([[3, 16]], [[3, 16], [1, 6]]), ids=str)
@pytest.mark.parametrize("row_type", ROW_TYPES)
@pytest.mark.parametrize("case", long_but(EACH_METHOD, CASES))
def test_bytes_in_the_file_are_those_of_the_footprint(case, row_type, dims, tmp_path):
    for dim in dims:
        collection = pooled(CASES[case], plain_tables(dim))
        path = tmp_path / str(dim)
        written = save(collection, path, row_type=row_type)
        serving = load(path)
        measured = header_bytes(path / "model.safetensors")["tables"]
        assert measured == serving.footprint.serve_bytes == written.config.tables.bytes
        whole = collection.compact().footprint
        assert measured == served_footprint(whole, written.config.tables.row_types).serve_bytes
        if row_type == "fp32":
            assert measured == whole.serve_bytes == count_bytes(collection.serving_tensors())
        else:
            assert measured <= whole.serve_bytes


@pytest.mark.parametrize("row_type", long_but(["int8"], ["fp16", "int8", "int4"]))
@pytest.mark.parametrize("case", CASES)
def test_narrow_rows_answer_as_their_restored_weights(case, row_type, tmp_path):
    tables = awkward_tables((16, 6, 3))
    collection = pooled(CASES[case], tables)
    written = save(collection, tmp_path / "a", row_type=row_type)
    types = written.config.tables.row_types
    tensors = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")
    restored = collection.compact()
    if restored is collection:
        restored = pooled(CASES[case], tables)
        restored.load_state_dict(collection.state_dict())
    forms = restored.states()
    for each, group in zip(forms, restored.groups):
        for table in group.backend.physical_tables:
            stored = tensors[f"tables.rows.{table.name}"]
            rows = each.form.rows(table.name).whole()
            back = unpack(stored, table.embedding_dim, types[table.name])
            error = (back - rows).abs().max().item()
            if types[table.name] != "fp32":
                assert error == pytest.approx(written.row_error["tables"][table.name])
            steps = {"fp32": 0, "fp16": 2**-11, "int8": 1 / 255, "int4": 1 / 15}
            spread = (rows.amax(1) - rows.amin(1)).max().item() + rows.abs().max().item() * 2**-7
            assert error <= 0.51 * steps[types[table.name]] * spread + rows.abs().max() * 2**-10
            rows.copy_(back)
    for shape in ("single", "ragged"):
        batch = random_batch(tables, seed=6, shape=shape)
        wanted = restored(batch).values()
        for kernel in ("auto", "fbgemm", "torch"):
            found = load(tmp_path / "a", rows=kernel)(batch).values()
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_plain_tensors_answer_as_a_keyed_jagged_tensor(saved):
    tables, _, path = saved
    serving = load(path)
    batch = random_batch(tables, seed=7)
    bags = batch.to_dict()
    pairs = {key: (jagged.values(), jagged.offsets()) for key, jagged in bags.items()}
    assert torch.equal(serving(pairs).values(), serving(batch).values())
    assert torch.equal(serving(bags).values(), serving(batch).values())
    single = random_batch(tables, seed=8, shape="single")
    ids = {key: jagged.values() for key, jagged in single.to_dict().items()}
    assert torch.equal(serving(ids).values(), serving(single).values())
    more = ids | {"other": torch.tensor([1])}
    assert torch.equal(serving(more).values(), serving(single).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids.pop("f2"), "features f2, which the batch lacks; it has f0, f1"),
        (lambda ids: ids.update(f2=torch.zeros(6)), "'f2': expected .* got torch.float32"),
        (lambda ids: ids.update(f2=torch.zeros(2, 3).long()), r"shape \(2, 3\)"),
        (lambda ids: ids.update(f2=[1, 2]), r"'f2': expected .* got \[1, 2\]"),
        (lambda ids: ids.update(f2=torch.zeros(5).long()), "batch size: f0 6, f1 6, f2 5"),
        (
            lambda ids: ids.update(f2=(torch.zeros(3).long(), torch.tensor([0, 2, 4]))),
            "offsets must ascend from 0 to the 3 values, got 0 to 4",
        ),
    ],
)
def test_odd_plain_tensors_are_named(saved, change, message):
    _, _, path = saved
    ids = {f: torch.zeros(6, dtype=torch.int64) for f in ("f0", "f1", "f2")}
    change(ids)
    with pytest.raises(DataError, match=message):
        load(path)(ids)


def test_a_loaded_collection_stands_in_a_torchrec_model(tmp_path):
    tables = plain_tables(8)
    collection = pooled(CASES["unified"], tables)
    save(collection, tmp_path / "a")
    serving = load(tmp_path / "a")
    torch.manual_seed(1)
    model = DLRM(
        collection,
        dense_in_features=3,
        dense_arch_layer_sizes=[8],
        over_arch_layer_sizes=[4, 1],
    )
    batch, dense = random_batch(tables, seed=9, shape="single"), torch.rand(6, 3)
    wanted = model(dense, batch)
    served = DLRM(
        serving, dense_in_features=3, dense_arch_layer_sizes=[8], over_arch_layer_sizes=[4, 1]
    )
    dense_part = {k: v for k, v in model.state_dict().items() if "embedding_bag_coll" not in k}
    missing, unexpected = served.load_state_dict(dense_part, strict=False)
    assert not unexpected and all("embedding_bag_collection" in name for name in missing)
    torch.testing.assert_close(served(dense, batch), wanted, rtol=1e-5, atol=1e-6)


def test_loading_draws_nothing_and_trains_nothing(saved):
    _, _, path = saved
    torch.manual_seed(5)
    before = torch.get_rng_state()
    serving = load(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not serving.training and not any(p.requires_grad for p in serving.parameters())


def test_an_existing_folder_is_left_as_it_is(saved):
    _, collection, path = saved
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(ArtefactError, match="exists and is left as it is"):
        save(collection, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [entry.name for entry in path.parent.iterdir()] == ["artefact"]


def test_an_artefact_over_its_budget_is_not_written(saved, tmp_path):
    _, collection, _ = saved
    size = collection.footprint.serve_bytes
    with pytest.raises(BudgetError, match=f"take {size:,} bytes .* budget of {size - 1:,} bytes"):
        save(collection, tmp_path / "small", budget=size - 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["artefact"]
    assert save(collection, tmp_path / "fits", budget=size).config.budget == size
    assert load(tmp_path / "fits").footprint.serve_bytes == size


def test_nothing_is_left_when_writing_fails(saved, tmp_path, monkeypatch):
    _, collection, _ = saved

    def fail(*_args, **_options):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("embcomp.serving.artefact_saving.write_tensors", fail)
    with pytest.raises(ArtefactError, match="b could not be written: no space .* free. Nothing"):
        save(collection, tmp_path / "b")
    assert [entry.name for entry in tmp_path.iterdir()] == ["artefact"]


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node[int(parent) if parent.isdigit() else parent]
        node[last] = value
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path, change):
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda p: (p / "config.json").unlink(), "is not an artefact: it has no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "is not JSON"),
        (lambda p: (p / "config.json").write_text("{}"), "does not describe an artefact"),
        (
            lambda p: edit_config(p, format_version=4),
            "format_version 4; this embcomp reads 2 and 3",
        ),
        (
            lambda p: edit_config(p, format_version=1),
            "format_version 1; this embcomp reads 2 and 3: it knew tables by their places, .* export again",
        ),
        (lambda p: edit_config(p, tables__kind="x"), "damaged: tables.kind"),
        (lambda p: edit_config(p, tables=None), "neither tables nor a model"),
        (
            lambda p: edit_config(p, tables__plan__0__method={"name": "hush"}),
            "unknown method 'hush' .did you mean 'hash'",
        ),
        (
            lambda p: edit_config(p, tables__plan__0__method={"name": "hash", "rows": 3}),
            "method 'hash': unknown key 'rows'",
        ),
        (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\x08" + b"\0" * 20), "is damaged"),
        (
            lambda p: edit_tensors(p, lambda t: t.pop("tables.rows.t1")),
            "the tensor rows.t1 is missing",
        ),
        (
            lambda p: edit_tensors(p, lambda t: t.update({"tables.rows.t1": torch.zeros(3, 8)})),
            r"rows.t1 should be torch.float32 of shape \(90, 8\), but is .* \(3, 8\)",
        ),
        (
            lambda p: edit_tensors(p, lambda t: t.update({"tables.extra": torch.zeros(1)})),
            "no method wants the tensors extra",
        ),
    ],
)
def test_damaged_and_foreign_folders_are_named(saved, damage, message):
    _, _, path = saved
    damage(path)
    with pytest.raises((ArtefactError, ConfigError), match=message):
        load(path)


def test_a_flipped_bit_is_found_unless_nobody_wants_to_know(saved):
    _, _, path = saved
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    for options in ({}, {"verify": True}, {"rows": "torch"}, {"mmap": True}):
        with pytest.raises(ArtefactError, match="checksum of the tensor tables.rows.* is not the"):
            load(path, **options)
    load(path, verify=False)
    load(path, verify=False, mmap=True)


def test_other_row_types_and_modules_are_refused(saved, tmp_path):
    _, collection, _ = saved
    with pytest.raises(ConfigError, match="fp32, fp16, int8, int4; got 'int2'"):
        save(collection, tmp_path / "b", row_type="int2")
    with pytest.raises(ArtefactError, match="expected a CompressedEmbeddingBagCollection"):
        save(torch.nn.Linear(2, 2), tmp_path / "b")
    with torch.no_grad():
        next(collection.rows.parameters()).fill_(1e6)
    with pytest.raises(ConfigError, match="weights that fp16 rows cannot"):
        save(collection, tmp_path / "b", row_type="fp16")


def test_a_served_module_stays_where_it_was_loaded_for(saved):
    _, _, path = saved
    with pytest.raises(ValueError, match=r"load it there: embcomp.load\(path, device=\"meta\"\)"):
        load(path).to("meta")
    with pytest.raises(ArtefactError, match="serves on the CPU"):
        load(path, rows="fbgemm", device="cuda")
    tables = awkward_tables((8, 8, 8))
    batch = random_batch(tables, seed=1)
    serving = load(path, rows="torch")
    wanted = serving(batch).values()
    assert torch.equal(serving.half().float()(batch).values(), wanted)


def test_loading_needs_no_training_code(saved):
    _, _, path = saved
    program = (
        "import sys, embcomp\n"
        f"embcomp.load({str(path)!r})\n"
        "bad = [m for m in sys.modules if m.startswith(('embcomp.training', 'optuna'))]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
