"""`embcomp bench` times what it says: batches, callers, percentiles and bytes."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from embcomp import CompressedEmbeddingBagCollection, Hash, load, save
from embcomp.backends import Coded, LowDim
from embcomp.cli import app
from embcomp.models import MODELS, ModelInputs
from embcomp.serving import serving_speed
from embcomp.serving.artefact_saving import save_model
from embcomp.serving.fused.library import why_missing
from embcomp.serving.serving_speed import bytes_of_a_row, measure_speed
from embcomp.testing.cases import pooled, unpooled
from embcomp.testing.check_data import awkward_tables, plain_tables
from tests.helpers.backends_under_test import CASES

COMPILED = why_missing() is None
TABLES = ["artefact", *(["full"] if COMPILED else []), "full, TorchRec", "raw gather"]


def run(*words):
    return CliRunner().invoke(app, ["bench", *map(str, words)])


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "artefact"
    save(pooled(CASES["coded"], awkward_tables((16, 6, 3))), folder)
    return folder


def test_every_answer_batch_size_and_number_of_callers_is_timed(artefact, tmp_path):
    files = tmp_path / "speed.json", tmp_path / "speed.png"
    words = ("--batch-sizes", "1,5", "--threads", "1,3", "--seconds", "0.02")
    done = run(artefact, *words, "--json", files[0], "--plot", files[1])
    assert done.exit_code == 0, done.output
    found = json.loads(files[0].read_text())
    assert files[1].read_bytes().startswith(b"\x89PNG")
    seen = [(each["answers"], each["batch_size"], each["threads"]) for each in found["latencies"]]
    assert seen == [(name, size, n) for size in (1, 5) for n in (1, 3) for name in TABLES]
    for each in found["latencies"]:
        assert 0 < each["p50"] <= each["p90"] <= each["p99"]
        assert each["calls"] >= 4 * 5 * each["threads"]
    assert found["rows_held"] == 1 and found["bytes_per_row"]["full"] == 4 * (2 * 16 + 6 + 3)
    for name in TABLES:
        assert done.stdout.count(f" {name} ") == 4
    assert f"uncompressed, {4 * 41:,} of {4 * (60 * 16 + 90 * 6 + 75 * 3):,}" in done.stdout


@pytest.mark.skipif(not COMPILED, reason="no compiled look-up")
@pytest.mark.parametrize(
    ("method", "row_type", "wanted"),
    [
        (Hash(num_buckets=20, collisionless=0), "fp32", 64),
        (Hash(num_buckets=20, collisionless=0), "int8", 4 + 16),
        (Coded(subvector_dim=4, num_codewords=16), "fp32", 4 * (16 + 1)),
        (LowDim(width=4, kept={"t0": 5, "t1": 6, "t2": 7}), "fp32", 16 + 36),
    ],
)
def test_bytes_are_those_that_an_id_reads(tmp_path, method, row_type, wanted):
    tables = [table.bag() for table in plain_tables(16)]
    save(CompressedEmbeddingBagCollection(tables, method).eval(), tmp_path / "a", row_type=row_type)
    assert bytes_of_a_row(load(tmp_path / "a")) == 3 * wanted


@pytest.mark.parametrize("name", ["dlrm", "deepfm", "lr"])
def test_a_model_is_timed_beside_its_network_on_full_tables(tmp_path, name):
    names = tuple(f"f{n}" for n in range(3))
    inputs = ModelInputs(feature_names=names, embedding_dim=8, num_dense=2, pooling="sum")
    settings = MODELS[name]()
    parts = [
        CompressedEmbeddingBagCollection(
            [table.bag() for table in plain_tables(dim)], Hash(num_buckets=20, collisionless=0)
        )
        if wanted
        else None
        for dim, wanted in ((8, settings.uses_embeddings), (1, settings.uses_first_order))
    ]
    network = settings.build(inputs, *parts).eval()
    save_model(network, tmp_path / "a", settings=settings, inputs=inputs)
    found = measure_speed(tmp_path / "a", batch_sizes=[3], seconds=0.01)
    assert [each.answers for each in found.latencies] == [
        *TABLES,
        "model",
        "model, full, TorchRec",
    ]


def test_uncompressed_tables_that_memory_does_not_hold_are_cut(artefact, monkeypatch):
    monkeypatch.setattr(serving_speed, "_OF_MEMORY", 0.0)
    found = measure_speed(artefact, batch_sizes=[2], seconds=0.01)
    assert found.rows_held == 0 and len(found.latencies) == len(TABLES)


def test_threads_of_torch_are_as_they_were(artefact):
    before = torch.get_num_threads()
    measure_speed(artefact, batch_sizes=[1], seconds=0.01)
    assert torch.get_num_threads() == before


def test_what_cannot_be_measured_is_refused_in_one_line(artefact, tmp_path):
    save(pooled(CASES["hash"], plain_tables(8), is_weighted=True), tmp_path / "weighted")
    save(unpooled(CASES["hash"], plain_tables(8)), tmp_path / "unpooled")
    there = sorted(path.name for path in tmp_path.iterdir())
    for words, told in (
        ((tmp_path / "none",), "does not exist"),
        ((tmp_path / "weighted",), "only pooled tables without weights are measured"),
        ((tmp_path / "unpooled",), "only pooled tables without weights are measured"),
        ((artefact, "--batch-sizes", "1,x"), "--batch-sizes: expected numbers from 1"),
        ((artefact, "--batch-sizes", "0"), "--batch-sizes: expected numbers from 1"),
        ((artefact, "--threads", "99999999"), "--threads: expected numbers from 1"),
        ((artefact, "--json", tmp_path / "no" / "f"), "cannot be written"),
        ((artefact, "--plot", tmp_path), "cannot be written"),
    ):
        refused = run(*words)
        assert refused.exit_code == 1 and told in " ".join(refused.stderr.split()), refused.output
        assert "Traceback" not in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == there
