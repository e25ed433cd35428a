"""No change of an artefact's bytes is answered from: each is one message that names a file."""

from __future__ import annotations

import json
import random
import shutil

import polars as pl
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from embcomp import load, load_program, save
from embcomp.cli import app
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ArtefactError, EmbcompError
from embcomp.io.tensor_checksums import bytes_of, file_checksums
from embcomp.serving.artefact_config import ArtefactConfig
from embcomp.serving.artefact_folder import find_tensors
from embcomp.serving.artefact_integrity import check_vocabularies
from embcomp.serving.artefact_tensors import TensorReader, lazily
from embcomp.testing.cases import pooled
from embcomp.testing.check_data import awkward_tables
from embcomp.training import train
from embcomp.training.export.export import export_run
from tests.helpers.artefact_damage import DAMAGES, flip_a_bit_of_a_weight
from tests.helpers.backends_under_test import CASES
from tests.helpers.training_cases import toy_config, write_dataset

pytestmark = pytest.mark.slow

METHODS = ("full", "hash", "low_dim_kept", "unified_projected", "coded", "qr_mult")
SEEDS = range(6)


@pytest.fixture(scope="module")
def collections(tmp_path_factory):
    """An artefact of a collection alone for each of several methods."""
    folder = tmp_path_factory.mktemp("collections")
    for n, case in enumerate(METHODS):
        row_type = ("fp32", "fp16", "int8", "int4")[n % 4]
        save(pooled(CASES[case], awkward_tables((16, 6, 3))), folder / case, row_type=row_type)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An artefact of a whole model with vocabularies and a program."""
    folder = tmp_path_factory.mktemp("model")
    config = toy_config(
        write_dataset(folder / "data"),
        "tables.method={name: hash, collisionless: 0}",
        "tables.budget=50%",
        "model={name: autoint, attention_dim: 4, num_heads: 2, attention_layers: 1}",
    )
    train(config, runs=folder, quiet=True)
    export_run(folder / "toy", folder / "artefact", formats=("safetensors", "pt2"))
    return folder / "artefact"


def assert_refused(folder, call):
    """One message of ours that says where; no warning, no traceback of a library."""
    with pytest.raises(EmbcompError) as caught:
        call(folder)
    text = str(caught.value)
    assert str(folder) in text and "Traceback" not in text
    assert caught.value.__cause__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("case", METHODS)
def test_no_damage_to_tables_is_answered_from(collections, tmp_path, case, damage):
    for seed in SEEDS:
        folder = tmp_path / str(seed)
        shutil.copytree(collections / case, folder)
        DAMAGES[damage](folder, random.Random(f"{damage} {seed}"))
        assert_refused(folder, load)


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_to_a_model_is_answered_from(model, tmp_path, damage):
    for seed in range(12):
        folder = tmp_path / str(seed)
        shutil.copytree(model, folder)
        DAMAGES[damage](folder, random.Random(f"model {damage} {seed}"))
        assert_refused(folder, load)
        shown = CliRunner().invoke(app, ["inspect", str(folder)])
        assert shown.exit_code == 1 and isinstance(shown.exception, SystemExit), shown.output
        assert str(folder) in shown.stderr.replace("\n", "") or folder.name in shown.stderr


@pytest.mark.parametrize(
    "file", ["config.json", "dataset.json", "vocabulary/C1.parquet", "program.pt2"]
)
def test_every_file_of_an_artefact_is_checked_to_its_last_byte(model, tmp_path, file):
    shutil.copytree(model, tmp_path / "a")
    content = bytearray((tmp_path / "a" / file).read_bytes())
    content[-1] ^= 16
    (tmp_path / "a" / file).write_bytes(content)
    with pytest.raises(ArtefactError, match=f"{file} is "):
        load(tmp_path / "a")
    if file != "program.pt2":
        return
    with pytest.raises(ArtefactError, match="program.pt2 is damaged or was changed"):
        load_program(tmp_path / "a")


def test_a_program_is_loaded_where_it_is_whole(model, collections):
    described = ArtefactConfig.read(model).program
    assert described is not None
    batch = {"ids": torch.ones(2, 3, 1, dtype=torch.int64), "lengths": torch.ones(2, 3).long()}
    found = load_program(model)({**batch, "dense": torch.zeros(2, 2)})["logits"]
    with torch.no_grad():
        ids = {name: torch.ones(2, dtype=torch.int64) for name in ("C1", "C2", "C3")}
        torch.testing.assert_close(found, load(model)(torch.zeros(2, 2), ids))
    with pytest.raises(ArtefactError, match="has no program; `embcomp export --format pt2`"):
        load_program(collections / "full")


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["model"]["settings"].update(num_heads=1),
        lambda c: c["model"]["feature_names"].reverse(),
        lambda c: c["tables"]["plan"][0]["method"].update(seed=5),
        lambda c: c["tables"]["tables"].reverse(),
    ],
    ids=["heads", "feature order", "seed", "table order"],
)
def test_a_description_that_would_give_other_logits_is_refused(model, tmp_path, edit):
    shutil.copytree(model, tmp_path / "a")
    content = json.loads((tmp_path / "a/config.json").read_text())
    edit(content)
    (tmp_path / "a/config.json").write_text(json.dumps(content, indent=1) + "\n")
    with pytest.raises(EmbcompError, match=r"config.json is damaged or was changed: its digest"):
        load(tmp_path / "a")


def test_a_changed_vocabulary_is_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "a")
    path = tmp_path / "a/vocabulary/C1.parquet"
    frame = pl.read_parquet(path)
    frame.with_columns(pl.col("id").reverse()).write_parquet(path)
    with pytest.raises(ArtefactError, match=r"vocabulary/C1.parquet is damaged or was changed"):
        load(tmp_path / "a")


def test_tables_and_vocabularies_of_two_datasets_are_named(model, tmp_path, monkeypatch):
    config = ArtefactConfig.read(model)
    assert config.tables is not None
    info = DatasetInfo.load(model)
    size = info.categorical[1].num_embeddings
    info.categorical[1].num_raw_values = size + 1
    info.categorical[1].num_embeddings = size + 3
    message = f"table 'C2' holds {size} ids, and the vocabulary of its feature 'C2' has {size + 3}"
    with pytest.raises(ArtefactError, match=message):
        check_vocabularies(config, info, model)
    monkeypatch.setattr(DatasetInfo, "load", lambda folder: info)
    shown = CliRunner().invoke(app, ["inspect", str(model)])
    assert shown.exit_code == 1 and isinstance(shown.exception, SystemExit)
    assert "table 'C2' holds" in shown.stderr


def test_one_digest_stands_for_every_file(model, tmp_path):
    digest = ArtefactConfig.read(model).digest
    shown = CliRunner().invoke(app, ["inspect", str(model), "--json"])
    assert len(digest) == 64 and json.loads(shown.stdout)["digest"] == digest
    listed = set(ArtefactConfig.read(model).files)
    there = {str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()}
    assert listed == there - {"config.json"}
    collection = pooled(CASES["full"], awkward_tables((8, 8, 8)))
    digests = []
    for n, change in enumerate([0.0, 0.0, 1.0]):
        with torch.no_grad():
            next(collection.rows.parameters())[0, 0] += change
        digests.append(save(collection, tmp_path / str(n)).config.digest)
    assert digests[0] == digests[1] != digests[2]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    collection = pooled(CASES["full"], awkward_tables((8, 8, 8)))
    with torch.no_grad():
        next(collection.rows.parameters())[3, 1] = float("nan")
    with pytest.raises(ArtefactError, match=r"tensor tables.rows.t0 holds NaN or infinities"):
        save(collection, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_nan_in_a_tensor_is_named(collections, tmp_path):
    shutil.copytree(collections / "full", tmp_path / "a")
    file = tmp_path / "a/model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["tables.rows.t1"] = tensors["tables.rows.t1"].clone()
    tensors["tables.rows.t1"][2, 2] = float("nan")
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match=r"tables.rows.t1 .* and it holds NaN or infinities"):
        load(tmp_path / "a")


@pytest.mark.parametrize("options", [{}, {"rows": "torch"}, {"mmap": True}])
def test_artefacts_of_format_2_are_checked_by_their_crc32s(collections, tmp_path, options):
    """Their tensors' checksums are CRC-32s of pieces, as those of files are."""
    shutil.copytree(collections / "coded", tmp_path / "a")
    tensors = safetensors.torch.load_file(tmp_path / "a/model.safetensors")
    for n, tensor in enumerate(tensors.values()):
        (tmp_path / f"{n}.bin").write_bytes(bytes_of(tensor).tobytes())
    crcs = file_checksums(tmp_path / f"{n}.bin" for n in range(len(tensors)))
    own = {name: crcs[tmp_path / f"{n}.bin"] for n, name in enumerate(tensors)}
    config = ArtefactConfig.read(tmp_path / "a")
    older = config.model_copy(update={"tensors": own, "format_version": 2})
    (tmp_path / "a/config.json").write_text(older.to_json())
    load(tmp_path / "a", **options)
    flip_a_bit_of_a_weight(tmp_path / "a", random.Random(0))
    with pytest.raises(ArtefactError, match="checksum of the tensor tables.* is not the one"):
        load(tmp_path / "a", **options)
    load(tmp_path / "a", verify=False, **options)


def test_a_tensor_that_is_cut_short_under_its_reader_is_named(collections, tmp_path):
    shutil.copytree(collections / "full", tmp_path / "a")
    stored = find_tensors(tmp_path / "a")
    last = max(stored.values(), key=lambda tensor: tensor.start)
    with last.file.open("r+b") as file:
        file.truncate(last.start)
    with TensorReader() as reader, pytest.raises(ArtefactError, match="it ends too early"):
        lazily(stored, {}, reader)[last.name].tensor()
