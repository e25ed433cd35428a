"""The command when it is stopped, cannot write, or meets what no one foresaw."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.training.reporting.standing import standing_of
from tests.helpers.long import long_but

pytestmark = pytest.mark.slow

CONFIG = """
name: toy_run
data: {path: toy, batch_size: 64, eval_batch_size: 128}
tables: {embedding_dim: 8, method: {name: hash, ratio: 0.5, collisionless: 0}}
model: {name: autoint, attention_dim: 8, attention_layers: 1, num_heads: 1}
train: {epochs: 1, device: cpu}
"""
SEARCH = """
name: toy_search
base: config.yaml
budget: 50%
choices: [{name: full}, {name: hash, ratio: 0.5}]
trials: {count: 2}
"""
VERBS = {
    "train": (["train", "config.yaml"], "embcomp.training.api.train", "no checkpoint yet"),
    "evaluate": (["evaluate", "run"], "embcomp.training.api.evaluate", "run it again"),
    "export": (
        ["export", "run"],
        "embcomp.training.export.export.export_run",
        "no artefact was made",
    ),
    "prepare": (
        ["prepare", "criteo", "raw", "out"],
        "embcomp.data_pipelines.prepare.prepare",
        "out",
    ),
    "generate": (
        ["generate", "raw.txt"],
        "embcomp.data_pipelines.synthetic.generate.write_criteo_log",
        "raw.txt was not made",
    ),
    "demo": (["demo"], "embcomp.cli.demo_steps.run_demo", "goes on from there"),
    "validate": (
        ["validate", "toy"],
        "embcomp.data_pipelines.validate.validate_dataset",
        "run it again",
    ),
}
COMMAND = [sys.executable, "-m", "embcomp.cli"]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_toy_dataset("toy")
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return tmp_path


@pytest.fixture(autouse=True)
def heard():
    """A shell starts what runs in its background deaf to Ctrl-C, these tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(*arguments, **options):
    return CliRunner().invoke(app, list(arguments), **options)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_every_long_verb_says_where_it_stands_and_exits_as_stopped_programs_do(
    workplace, monkeypatch, verb, number, code
):
    arguments, function, standing = VERBS[verb]

    def stop(*args, **kwargs):
        os.kill(os.getpid(), number)
        time.sleep(5)  # Python runs handlers between two instructions

    monkeypatch.setattr(function, stop)
    before = signal.getsignal(signal.SIGTERM)
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert standing in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    long_but([(signal.SIGTERM, 143)], [(signal.SIGINT, 130), (signal.SIGTERM, 143)]),
)
def test_a_stopped_training_names_its_last_checkpoint_and_goes_on_from_it(workplace, number, code):
    many = [*COMMAND, "train", "config.yaml", "train.epochs=12", "train.checkpoint_every=5"]
    process = subprocess.Popen(many, stderr=subprocess.PIPE, text=True)
    checkpoints = workplace / "runs" / "toy_run" / "checkpoints"
    while not list(checkpoints.glob("step-*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code, error
    assert "is kept up to step" in error and "Traceback" not in error
    again = subprocess.run(many, check=False, stderr=subprocess.PIPE, text=True, timeout=200)
    assert again.returncode == 0 and "goes on from step" in again.stderr


def test_what_stands_is_read_from_every_kind_of_run_folder(tmp_path):
    assert "no checkpoint yet" in standing_of(tmp_path / "none")
    (tmp_path / "a" / "checkpoints" / "step-0000000040").mkdir(parents=True)
    assert "up to step 40;" in standing_of(tmp_path / "a")
    second = tmp_path / "a" / "stages" / "2-codes"
    second.mkdir(parents=True)
    assert "up to step 40;" in standing_of(tmp_path / "a")
    (second / "progress.json").touch()
    assert "stage 2-codes has found" in standing_of(tmp_path / "a")
    (second / "checkpoints" / "step-0000000000").mkdir(parents=True)
    assert "up to step 0 of stage 2-codes" in standing_of(tmp_path / "a")
    (second / "done.json").touch()
    assert "has finished stage 2-codes" in standing_of(tmp_path / "a")
    (tmp_path / "a" / "report.json").touch()
    assert standing_of(tmp_path / "a").endswith("is finished")


@pytest.mark.parametrize("arguments", [["ls"], ["cat", "unified"], ["ls", "methods"]])
def test_a_reader_that_leaves_early_is_no_error_of_ours(workplace, arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, *arguments], check=False, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


def test_a_stdout_that_is_closed_or_full_is_no_traceback(workplace):
    command = " ".join([*COMMAND, "ls", "methods"])

    def shell(rest: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            f"{command} {rest}", check=False, shell=True, stderr=subprocess.PIPE, text=True
        )

    closed = shell(">&-")
    assert closed.returncode == 0 and closed.stderr == ""
    full = shell(">/dev/full")
    assert full.returncode == 1 and "No space left on device" in full.stderr
    assert full.stderr.count("\n") == 1


def test_a_defect_is_one_line_that_names_the_place_and_how_to_see_its_trace(workplace, monkeypatch):
    def broken(path):
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr("embcomp.data_pipelines.validate.validate_dataset", broken)
    result = run("validate", "toy")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "unexpected KeyError" in result.stderr and "EMBCOMP_DEBUG=1" in result.stderr
    assert "at cli/validate.py, line" in result.stderr
    assert isinstance(run("--traceback", "validate", "toy").exception, KeyError)
    shown = run("validate", "toy", env={"EMBCOMP_DEBUG": "1"})
    assert isinstance(shown.exception, KeyError)
