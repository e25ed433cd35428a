"""`embcomp train` and `evaluate`: a run from a YAML, in one process, with named errors."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.config.train_config import load_config
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.training.run_folder import RunFolder
from tests.helpers.resealed import reseal

pytestmark = pytest.mark.slow

CONFIG = """
name: toy_run
data: {path: toy, batch_size: 64, eval_batch_size: 128}
tables: {embedding_dim: 8, method: {name: hash, ratio: 0.5, collisionless: 0}}
model: {name: autoint, attention_dim: 8, attention_layers: 1, num_heads: 1}
train: {epochs: 1, device: cpu}
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a dataset and a config, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    write_toy_dataset("toy")
    write_toy_dataset("no_valid", rows=(64, 0, 0))
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_a_run_leaves_its_folder_and_prints_its_report(workplace):
    result = run("train", "config.yaml", "train.epochs=2", "--quiet")
    assert result.exit_code == 0, result.output
    assert "hash" in result.output and "test" in result.output and "rows/s" in result.output
    folder = workplace / "runs" / "toy_run"
    report = json.loads((folder / "report.json").read_text())
    assert report["epochs"] == 2
    assert load_config(folder / "config.yaml").train.epochs == 2

    scored = run("evaluate", "runs/toy_run")
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout)["auc"] == report["test"]["auc"]
    valid = run("evaluate", "runs/toy_run", "--split", "valid")
    assert json.loads(valid.stdout)["auc"] == report["valid"]["auc"]

    compared = run("compare", "runs/toy_run", "runs/toy_run", "--out", "both")
    assert compared.exit_code == 0, compared.output
    assert compared.stdout.count("toy_run") == 2 and "hash" in compared.stdout
    assert (workplace / "both" / "report.html").is_file()
    assert (workplace / "both" / "auc_against_bytes.png").is_file()

    again = run("train", "config.yaml", "train.epochs=2", "--quiet")
    assert again.exit_code == 0 and again.stdout == result.stdout

    changed = run("train", "config.yaml", "train.epochs=3", "--quiet")
    assert changed.exit_code == 1
    assert "train.epochs: 2 -> 3" in changed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing.yaml"], "no recipe 'nothing.yaml'"),
        (["train", "config.yaml", "train.epoch=1"], "did you mean 'epochs'"),
        (["train", "config.yaml", "data.path=elsewhere"], "elsewhere"),
        (["train", "config.yaml", "tables.budget=1"], "give either budget or method.ratio"),
        (
            ["train", "config.yaml", "tables={method: hash, budget: 10}"],
            "the smallest hash reaches",
        ),
        (["train", "config.yaml", "train.row_optimizer.name=adam"], "dense"),
        (["train", "config.yaml", "data.path=no_valid"], "no rows in its valid split"),
        (["train", "config.yaml", "--runs", "config.yaml"], "config.yaml"),
        (["evaluate", "runs/none"], "runs/none"),
        (["compare", "runs/none"], "runs/none does not exist"),
    ],
)
def test_bad_input_is_one_message_and_leaves_no_run(workplace, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not list((workplace / "runs").rglob("report.json"))


def test_a_run_that_never_began_does_not_stand_in_the_way(workplace):
    assert run("train", "config.yaml", "train.row_optimizer.name=adam").exit_code == 1
    mended = run("train", "config.yaml", "train.max_steps=1", "--quiet")
    assert mended.exit_code == 0, mended.output


def test_labels_that_are_all_the_same_are_reported_as_such(workplace):
    info = DatasetInfo.load("toy")
    for path in [Path("toy", file) for split in info.splits.values() for file in split.files]:
        table = pq.read_table(path)
        column = table.column_names.index("label")
        zeros = pa.array([0.0] * len(table), pa.float32())
        pq.write_table(table.set_column(column, table.schema.field("label"), zeros), path)
    reseal("toy")
    result = run("train", "config.yaml", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("auc undefined  log loss 0.") == 2


def test_two_trainings_in_one_folder_do_not_mix(workplace):
    folder = RunFolder(workplace / "runs" / "toy_run")
    with folder.locked():
        result = run("train", "config.yaml", "--quiet")
    assert result.exit_code == 1
    assert "another process is training in runs/toy_run" in result.stderr
    assert run("train", "config.yaml", "train.max_steps=1", "--quiet").exit_code == 0


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_torchrun_prints_one_report_and_leaves_cleanly(workplace):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", free_port(), "--no-python"]
    command += [str(Path(sys.executable).with_name("embcomp")), "train", "config.yaml"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, cwd=workplace
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tables ") == 1
    assert json.loads((workplace / "runs/toy_run/report.json").read_text())["world_size"] == 2


def flip_in_a_page(path, column):
    """Change one bit of a value, which leaves the file's size and footer as they were."""
    place = pq.read_metadata(path).row_group(0).column(column)
    whole = bytearray(path.read_bytes())
    whole[place.data_page_offset + place.total_compressed_size - 2] ^= 1
    path.write_bytes(whole)


def test_verify_finds_one_flipped_bit_before_anything_is_written(workplace):
    assert run("train", "config.yaml", "--quiet", "--verify").exit_code == 0
    flip_in_a_page(Path("toy/test/part-00000.parquet"), 3)
    for command in (["train", "config.yaml", "name=other"], ["evaluate", "runs/toy_run"]):
        result = run(*command, "--verify")
        assert result.exit_code == 1
        assert "test/part-00000.parquet: the SHA-256 is not that in dataset.json" in result.stderr
    assert not Path("runs/other").exists()


def test_what_is_quick_to_compare_is_compared_by_every_verb_that_opens_a_dataset(workplace):
    assert run("train", "config.yaml", "--quiet").exit_code == 0
    path = Path("toy/train/part-00000.parquet")
    whole = bytearray(path.read_bytes())
    whole[-20] ^= 1
    path.write_bytes(whole)
    for command in (
        ["plan", "config.yaml"],
        ["train", "config.yaml", "name=other"],
        ["evaluate", "runs/toy_run", "--split", "valid"],
        ["export", "runs/toy_run"],
    ):
        result = run(*command)
        assert result.exit_code == 1
        assert "part-00000.parquet has another footer" in result.stderr
    assert not Path("runs/other").exists()


def test_a_dataset_without_checksums_is_trained_on_with_a_line_about_it(workplace):
    content = json.loads(Path("toy/dataset.json").read_text())
    del content["checksums"], content["digest"]
    Path("toy/dataset.json").write_text(json.dumps(content))
    result = run("train", "config.yaml", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("toy records no checksums") == 1
    assert "toy records no checksums" in run("evaluate", "runs/toy_run").stderr
    assert "toy records no checksums" in run("validate", "toy").stdout
    refused = run("train", "config.yaml", "name=other", "--verify")
    assert refused.exit_code == 1
    assert "leave out --verify" in refused.stderr


@pytest.mark.parametrize("rows", [50_000_000, 10**12])
def test_an_absurd_table_is_refused_by_its_feature_before_anything_is_planned(workplace, rows):
    content = json.loads(Path("toy/dataset.json").read_text())
    content["categorical"][1].update(num_embeddings=rows, num_raw_values=0)
    del content["checksums"], content["digest"]
    Path("toy/dataset.json").write_text(json.dumps(content))
    for command in ("train", "plan"):
        result = run(command, "config.yaml")
        assert result.exit_code == 1
        assert "C2" in result.stderr and str(rows) in result.stderr
    assert not Path("runs").exists()
