"""Row types by table: at export, in a recipe, and the figures that a run reports for them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from embcomp import Full, Hash, LowDim, Plan, Unified, load, save
from embcomp.cli import app
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.table_row_types import RowTypes
from embcomp.errors import ConfigError
from embcomp.planning.config_plan import plan_config, sizes_of_dataset
from embcomp.serving.artefact_folder import header_bytes
from embcomp.testing.check_data import awkward_tables
from embcomp.training import Report, evaluate, train
from embcomp.training.export.export import export_run
from tests.helpers.training_cases import toy_config, train_on_ranks, write_dataset
from tests.training.test_stages import staged_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("types"))


@pytest.fixture(scope="module")
def run(dataset):
    config = toy_config(dataset, "tables.row_types={default: int8, C2: fp16, C3: fp32}")
    train(config, runs=dataset, quiet=True)
    return dataset / "toy"


def collection_of(plan):
    return CompressedEmbeddingBagCollection([t.bag() for t in awkward_tables((8, 8, 8))], plan)


def test_types_are_read_from_one_line():
    assert RowTypes.parse("int8") == RowTypes(default="int8")
    assert RowTypes.parse("C1=int8, C2=fp16") == RowTypes(tables={"C1": "int8", "C2": "fp16"})
    both = RowTypes.parse("int8,C3=fp32")
    assert [both.of_table(name) for name in ("C1", "C3")] == ["int8", "fp32"]
    assert RowTypes.of(both.plain()) == both
    for wrong in ("", "int8,fp16", "C1=int8,C1=fp16", "=int8", "default=int8", "C1=int2"):
        with pytest.raises(ConfigError):
            RowTypes.parse(wrong)


def test_each_table_is_stored_in_its_type(tmp_path):
    plan = Plan(default=LowDim(widths={"t2": 6}), overrides={"t1": Full()})
    saved = save(collection_of(plan), tmp_path / "a", row_type={"default": "int8", "t1": "fp16"})
    record = saved.config.tables
    assert record.row_types == {"t0": "int8", "t1": "fp16", "t2": "int8"}
    rows = [table.num_embeddings for table in record.tables]
    assert record.bytes == rows[0] * (4 + 8) + rows[1] * 16 + rows[2] * (4 + 6)
    assert record.bytes == header_bytes(tmp_path / "a/model.safetensors")["tables"]
    assert load(tmp_path / "a").footprint.serve_bytes == record.bytes


def test_tables_that_share_rows_have_one_type(tmp_path):
    shared = collection_of(Unified(num_buckets=20, num_tables=2, collisionless=0))
    with pytest.raises(ConfigError, match=r"share stored rows.* t0=int8, t1=fp32, t2=int8\. Give"):
        save(shared, tmp_path / "a", row_type={"default": "int8", "t1": "fp32"})
    hashed = collection_of(Hash(num_buckets=9, collisionless=0))
    with pytest.raises(ConfigError, match=r"called 't11' \(did you mean 't1'\?\); the tables are"):
        save(hashed, tmp_path / "a", row_type={"t11": "int8"})
    assert not list(tmp_path.iterdir())


def test_a_runs_figures_are_those_of_its_artefact(run, tmp_path):
    report = Report.load(run)
    found = export_run(run, tmp_path / "a", rows=75, tolerance=1)
    assert found.saved.config.tables.row_types == {"C1": "int8", "C2": "fp16", "C3": "fp32"}
    assert found.saved.config.tables.bytes == report.serve_bytes < report.full_bytes
    assert found.saved.config.first_order.bytes == report.first_order_bytes
    assert found.parity.served.auc == pytest.approx(report.test["auc"], abs=1e-9)
    assert found.parity.served.log_loss == pytest.approx(report.test["log_loss"], abs=1e-7)
    assert found.parity.trained.log_loss != pytest.approx(report.test["log_loss"], abs=1e-7)
    assert evaluate(run, "valid", quiet=True).metrics.log_loss == report.valid["log_loss"]
    config = toy_config(run.parent, "tables.row_types={default: int8, C2: fp16, C3: fp32}")
    plan = plan_config(config, sizes_of_dataset(run.parent))
    assert sum(line.serve for line in plan.lines()) == report.serve_bytes
    assert sum(line.serve for line in plan.first_order_lines()) == report.first_order_bytes


def test_training_knows_nothing_of_row_types(run, tmp_path):
    plain = train(toy_config(run.parent), runs=tmp_path, quiet=True)
    lines = [(each / "metrics.jsonl").read_text().splitlines() for each in (run, tmp_path / "toy")]
    assert lines[0][:-1] == lines[1][:-1]  # the last one is the test split's
    narrow = Report.load(run)
    assert (narrow.steps, narrow.best_step) == (plain.steps, plain.best_step)
    assert narrow.valid["log_loss"] != plain.valid["log_loss"]


def test_the_command_takes_types_by_table_and_names_what_is_wrong(run, tmp_path):
    def export(*options):
        return CliRunner().invoke(app, ["export", str(run), str(tmp_path / "a"), *options])

    wrong = export("--dtype", "int8,C9=fp32")
    assert wrong.exit_code == 1 and "no table is called 'C9'" in wrong.stderr
    assert export("--dtype", "int9").exit_code == 1
    done = export("--dtype", "fp32,C1=int8", "--tolerance", "1")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["row_type"] == {"default": "fp32", "C1": "int8"}
    assert config["tables"]["row_types"] == {"C1": "int8", "C2": "fp32", "C3": "fp32"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tables.row_types=int2"], "tables.row_types: rows are served as fp32"),
        (["tables.row_types=[int8]"], "expected a type, or a mapping from table to type"),
        (
            [
                "tables.row_types=int8",
                "train.sharding=column_wise",
                "train.row_optimizer.name=sgd",
            ],
            "column_wise splits rows",
        ),
        (["tables.row_types={C9: int8}"], "tables.row_types: no table is called 'C9'"),
        (["tables.row_types=int8", "tables.method=matryoshka"], "serves another form than it"),
        (
            [
                "tables.row_types={C1: int8}",
                "tables.method={name: unified, num_buckets: 9, collisionless: 0}",
            ],
            "tables that share stored rows",
        ),
    ],
)
def test_types_that_cannot_be_are_refused_before_training(dataset, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train(toy_config(dataset, *overrides), runs=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


def exported(config, runs):
    """The report of a finished run, and what its export found."""
    found = export_run(runs / config.name, runs / "a", rows=75, tolerance=1)
    return Report.load(runs / config.name), found


def test_ranks_round_the_rows_that_they_hold(workers, dataset, tmp_path):
    config = toy_config(dataset, "tables.row_types=int8", "train.sharding=row_wise")
    workers.run(2, train_on_ranks, config, tmp_path)
    report, found = exported(config, tmp_path)
    assert found.saved.config.tables.bytes == report.serve_bytes
    assert found.parity.served.log_loss == pytest.approx(report.test["log_loss"], abs=1e-7)


@pytest.mark.parametrize("method", ["optembed", "pq"])
def test_the_last_of_several_stages_is_rounded(dataset, tmp_path, method):
    config = staged_config(dataset, method, "tables.row_types=int8")
    train(config, runs=tmp_path, quiet=True)
    report, found = exported(config, tmp_path)
    assert found.saved.config.tables.bytes == report.serve_bytes
    assert found.parity.served.log_loss == pytest.approx(report.test["log_loss"], abs=1e-7)
    lines = plan_config(config, sizes_of_dataset(dataset)).lines()
    assert all(line.learnt for line in lines)
    assert sum(line.serve for line in lines) >= report.serve_bytes
