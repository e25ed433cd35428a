"""Runs whose dataset lies elsewhere than when they began."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.errors import ConfigError, DataError
from embcomp.training import evaluate, load_model, train
from embcomp.training.checkpoint import checkpoint_folder, saved_steps
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.loading import forms_of_run
from tests.helpers.training_cases import toy_config, write_dataset
from tests.training.test_stages import staged_config

pytestmark = pytest.mark.slow

VERBS = (["evaluate"], ["export"], ["plan"])


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A finished run in a folder from which its dataset has gone to another one."""
    place = tmp_path_factory.mktemp("moved")
    dataset = write_dataset(place / "before")
    train(toy_config(dataset, "train.max_steps=4"), runs=place / "runs", quiet=True)
    dataset.rename(place / "after")
    return place


def run(*arguments: str | Path):
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_misses_the_dataset_names_the_option_and_takes_it(moved, verb, tmp_path):
    folder = moved / "runs" / "toy"
    result = run(*verb, folder)
    assert result.exit_code == 1
    assert str(moved / "before") in result.stderr and "--data" in result.stderr
    out = [tmp_path / "artefact"] if verb == ["export"] else []
    result = run(*verb, folder, *out, "--data", moved / "after")
    assert result.exit_code == 0, result.output


def test_from_python_data_says_where_the_dataset_is(moved):
    folder, now = moved / "runs" / "toy", moved / "after"
    report = json.loads((folder / "report.json").read_text())
    assert evaluate(folder, data=now, quiet=True).metrics.auc == report["test"]["auc"]
    assert load_model(folder, data=now).state_dict()
    assert forms_of_run(folder, now) is not None
    with pytest.raises(DataError, match="--data FOLDER, or data=FOLDER"):
        load_model(folder)


def test_another_dataset_is_not_taken_for_the_one_that_moved(moved, tmp_path):
    other = write_dataset(tmp_path / "other")
    text = (other / "dataset.json").read_text()
    (other / "dataset.json").write_text(text.replace('"toy"', '"toys"', 1))
    with pytest.raises(ConfigError, match="prepared anew"):
        evaluate(moved / "runs" / "toy", data=other, quiet=True)


def test_training_goes_on_with_a_dataset_that_moved_and_writes_down_where_it_is(tmp_path):
    dataset = write_dataset(tmp_path / "before")
    config = toy_config(dataset, "train.max_steps=4", "train.checkpoint_every=2")
    train(config, runs=tmp_path, quiet=True)
    (tmp_path / "toy" / "report.json").unlink()
    checkpoint_folder(tmp_path / "toy" / "checkpoints", 4).rename(tmp_path / "away")
    dataset.rename(tmp_path / "after")
    recipe = tmp_path / "toy" / "config.yaml"
    result = run("train", recipe, "--runs", tmp_path, "-q")
    assert result.exit_code == 1 and "--data" in result.stderr
    result = run("train", recipe, "--runs", tmp_path, "-q", "--data", tmp_path / "after")
    assert result.exit_code == 0, result.output
    assert saved_steps(tmp_path / "toy" / "checkpoints")[-1] == 4
    assert RunFolder(tmp_path / "toy").config().data.path == str(tmp_path / "after")
    assert evaluate(tmp_path / "toy", quiet=True).metrics.rows == 75


def test_a_run_can_start_from_another_that_moved_with_their_dataset(tmp_path):
    dataset = write_dataset(tmp_path / "before")
    plain = ("name=full", "tables.method=full", "tables.budget=null", "train.stages={}")
    train(staged_config(dataset, "pq", *plain), runs=tmp_path, quiet=True)
    dataset.rename(tmp_path / "after")
    config = staged_config(tmp_path / "after", "pq", f"train.start_from={tmp_path / 'full'}")
    assert train(config, runs=tmp_path, quiet=True).stages[0]["steps"] == 0
