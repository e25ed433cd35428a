"""`embcomp ls | cat | cp` show everything there is, and never destroy a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embcomp.backends import BACKENDS
from embcomp.cli import app
from embcomp.config.catalog import find_recipe, recipe_folder, settings_of
from embcomp.config.train_config import load_config
from embcomp.data_pipelines.importers.registry import IMPORTERS
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.models import MODELS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("recipes", sorted(path.stem for path in CONFIGS.glob("*.yaml"))),
        ("methods", sorted(BACKENDS)),
        ("models", sorted(MODELS)),
        ("formats", sorted(IMPORTERS)),
    ],
)
def test_every_name_is_listed_with_a_summary(kind, names):
    result = run("ls", kind)
    assert result.exit_code == 0, result.output
    lines = [line.split(maxsplit=1) for line in result.output.splitlines() if line.strip()]
    assert [line[0] for line in lines] == names
    assert names and all(len(line) == 2 for line in lines)


def test_prepared_datasets_are_listed_and_unreadable_ones_too(tmp_path):
    write_toy_dataset(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "dataset.json").write_text('{"format_version": 99}')
    result = run("ls", "datasets", "--data", str(tmp_path))
    assert result.exit_code == 0
    assert "768 rows, 2 numeric and 3 categorical features" in result.output
    assert "unreadable" in result.output


def test_without_a_kind_everything_is_listed(tmp_path):
    result = run("ls", "--data", str(tmp_path))
    assert result.exit_code == 0
    for text in ("recipes", "criteo_autoint_full", "unified", "dcnv2", "none here", "avazu"):
        assert text in result.output


def test_cat_prints_a_recipe_as_it_stands():
    result = run("cat", "criteo_autoint_unified")
    assert result.exit_code == 0
    assert result.output == (CONFIGS / "criteo_autoint_unified.yaml").read_text()


@pytest.mark.parametrize("name", [*BACKENDS, *MODELS])
def test_cat_shows_every_setting_of_a_method_or_model(name):
    result = run("cat", name)
    assert result.exit_code == 0, result.output
    for field in dataclasses.fields((BACKENDS | MODELS)[name]):
        assert field.name in result.output


@pytest.mark.parametrize("cls", [*BACKENDS.values(), *MODELS.values()])
def test_every_setting_is_documented(cls):
    assert [setting.name for setting in settings_of(cls) if not setting.doc] == []


def test_cat_shows_what_a_dataset_holds(tmp_path):
    write_toy_dataset(tmp_path / "toy", multi_valued=["C2"])
    result = run("cat", str(tmp_path / "toy"))
    assert result.exit_code == 0, result.output
    for text in ("train", "512", "C1", "62", "I1", "multi-valued"):
        assert text in result.output


def test_cp_copies_and_renames_the_run(tmp_path):
    target = tmp_path / "new" / "mine.yaml"
    result = run("cp", "criteo_autoint_hash", str(target))
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(target)
    assert load_config(target).name == "mine"
    assert load_config(target).tables.method.name == "hash"


def test_cp_into_a_folder_keeps_the_file_as_it_is(tmp_path):
    assert run("cp", "criteo_autoint_hash", str(tmp_path)).exit_code == 0
    copied = tmp_path / "criteo_autoint_hash.yaml"
    assert copied.read_text() == (CONFIGS / copied.name).read_text()


def test_cp_never_overwrites(tmp_path):
    target = tmp_path / "mine.yaml"
    target.write_text("precious")
    result = run("cp", "criteo_autoint_hash", str(target))
    assert result.exit_code == 1
    assert "exists already" in result.stderr
    assert target.read_text() == "precious"


def test_recipes_of_the_working_directory_come_first(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "own.yaml").write_text("# Ours.\nname: own\n")
    monkeypatch.chdir(tmp_path)
    assert recipe_folder() == Path("configs")
    assert find_recipe("own") == Path("configs/own.yaml")
    assert "Ours." in run("ls", "recipes").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "modles"], "did you mean 'models'"),
        (["cat", "criteo_autoint_ful"], "did you mean 'criteo_autoint_full'"),
        (["cp", "nothing", "x.yaml"], "no recipe 'nothing'"),
    ],
)
def test_unknown_names_get_a_suggestion(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
