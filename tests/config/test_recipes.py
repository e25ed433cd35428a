"""Every YAML in configs/ is sound and trains, evaluates and reports on a toy dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from embcomp.benchmark.benchmark_config import is_benchmark, load_benchmark
from embcomp.benchmark.cells import prepare_benchmark
from embcomp.cli import app
from embcomp.config.train_config import load_config
from embcomp.data_pipelines.importers.table import TableImporter
from embcomp.planning.config_plan import plan_config, sizes_of_dataset
from embcomp.search.api import search
from embcomp.search.config.search_config import is_search, load_search
from embcomp.training.api import train
from tests.helpers.long import long_but
from tests.helpers.training_cases import write_recipe_dataset

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SCHEMAS = sorted((CONFIGS / "datasets").glob("*.yaml"))
SEARCHES = sorted(path for path in CONFIGS.glob("*.yaml") if is_search(path))
BENCHMARKS = sorted(path for path in CONFIGS.glob("*.yaml") if is_benchmark(path))
RECIPES = sorted(set(CONFIGS.rglob("*.yaml")) - {*SCHEMAS, *SEARCHES, *BENCHMARKS})
# These repeat what `frappe_x1_deepfm` and `frappe_x1_dcnv2` show of a run, for one more model.
TWINS = {f"frappe_x1_{model}" for model in ("fibinet", "gdcn", "masknet", "pnn", "xdeepfm")}
KEPT = [path for path in RECIPES if path.stem not in TWINS]
# Features that a recipe names are those of its own dataset.
OF_THE_TOY = {
    "frappe_x1_finalmlp": ["model.context1=[C1]", "model.context2=[C2]", "model.gate_only=[C1]"]
}
# The run is cut short, never changed in kind: models, methods and optimizers stay the recipe's.
SHORT = ["data.batch_size=64", "data.eval_batch_size=256", "train.epochs=1", "train.max_steps=4"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_recipe_dataset(tmp_path_factory.mktemp("recipes") / "toy")


def test_recipes_are_found():
    assert len(RECIPES) >= 11
    assert SCHEMAS
    assert len(SEARCHES) >= 2
    assert len(BENCHMARKS) >= 6


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_schema_of_raw_tables_is_sound(path):
    assert TableImporter.from_yaml(path).schema.categorical


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_named_after_its_file_and_says_what_it_is(path):
    assert load_config(path).name == path.stem
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", long_but(KEPT, RECIPES), ids=lambda path: path.stem)
def test_recipe_runs(path, dataset, tmp_path):
    config = load_config(path, [f"data.path={dataset}", *OF_THE_TOY.get(path.stem, []), *SHORT])
    if "generations" in vars(config.tables.method.settings):
        short_search = ["tables.method.generations=1", "tables.method.population=4"]
        config = load_config(path, [f"data.path={dataset}", *SHORT, *short_search])
    report = train(config, runs=tmp_path, quiet=True)
    assert {stage["steps"] for stage in report.stages} - {0} == {4}
    assert report.test is not None and 0 < report.test["auc"] < 1
    planned = sum(line.serve for line in plan_config(config, sizes_of_dataset(dataset)).lines())
    if config.tables.method.settings.learns_size:
        # `pep` keeps nothing of ids that these four steps did not see.
        least = 0 if config.tables.method.settings.name == "pep" else planned / 4
        assert least < report.serve_bytes <= planned
    else:
        assert report.serve_bytes == planned
    if config.tables.budget == "10%":
        assert report.compression >= 10


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_is_named_after_its_file_and_each_of_its_methods_can_be_trained(path, dataset):
    config = load_benchmark(path, [f"overrides.data.path={dataset}"])
    assert config.name == path.stem and path.read_text().startswith("# Benchmark: ")
    prepared = prepare_benchmark(config)
    left_out = {note.partition(": ")[0].split(", ")[1].split(" at ")[0] for note in prepared.notes}
    assert {cell.method for cell in prepared.cells} | left_out == {m.name for m in config.methods}
    assert {"full", "hash", "unified", "low_dim"} <= {cell.method for cell in prepared.cells}


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_search_is_named_after_its_file_and_shows_its_space(path, dataset):
    assert load_search(path).name == path.stem
    assert path.read_text().startswith("# ")
    result = CliRunner().invoke(
        app, ["search", str(path), f"overrides.data.path={dataset}", "--dry-run"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.count("of the budget") >= 1


@pytest.mark.parametrize("path", long_but(SEARCHES[:1], SEARCHES), ids=lambda path: path.stem)
def test_search_runs(path, dataset, tmp_path):
    short = ["trials.count=1", "trials.devices=cpu", "fidelity={max_steps: 2, valid_rows: 50}"]
    small = [f"overrides.data={{path: {dataset}, batch_size: 64, eval_batch_size: 256}}"]
    config = load_search(path, [*short, *small, "finals.points=0"])
    result = search(config, folder=tmp_path, quiet=True)
    (candidate,) = result.candidates
    assert candidate.state == "complete", candidate.message
    assert 0 < candidate.serve_bytes <= result.budget


@pytest.mark.parametrize(
    ("name", "first_order", "l2", "patience"),
    [
        ("autoint", False, 0.05, 2),
        ("autoint_plus", False, 0.1, 2),
        ("deepfm", True, 0.05, 2),
        ("dcnv2", False, 0.05, 2),
        ("fibinet", True, 0.05, 2),
        ("finalmlp", False, 0.05, 2),
        ("masknet", False, 0.1, 2),
        ("pnn", False, 0.05, 3),
        ("xdeepfm", True, 0.1, 2),
    ],
)
def test_benchmark_recipes_keep_the_published_settings(name, first_order, l2, patience):
    config = load_config(CONFIGS / f"frappe_x1_{name}.yaml")
    train_settings = config.train
    assert (config.seed, config.tables.embedding_dim, config.data.batch_size) == (2021, 10, 4096)
    assert config.tables.method.name == "full"
    assert (config.tables.init.name, config.tables.init.scale) == ("normal", 1e-4)
    rows = train_settings.row_optimizer
    assert (rows.name, rows.mode, rows.learning_rate) == ("adam", "dense", 1e-3)
    assert rows.l2 == l2
    assert train_settings.dense_optimizer.weight_decay == 0
    assert train_settings.clip_norm == 10
    assert train_settings.plateau is not None and train_settings.plateau.factor == 0.1
    assert train_settings.early_stop is not None and train_settings.early_stop.patience == patience
    assert config.model.settings.uses_first_order is first_order
