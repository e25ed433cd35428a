"""One command reads the dataset's description once, resolves the plan once, and asks one source for tables."""

from __future__ import annotations

import pytest

from embcomp.collection.plan import Plan
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.planning.config_plan import plan_config, sizes_of_dataset
from embcomp.training import evaluate, train
from embcomp.training.export.export import export_run
from embcomp.training.stages.run_context import RunContext
from tests.helpers.training_cases import toy_config, unstarted, write_dataset

pytestmark = pytest.mark.slow

STAGED = "tables.method={name: optembed, budget: 40%, generations: 1, population: 2}"


@pytest.fixture
def counted(monkeypatch):
    """How often descriptions are read and plans resolved."""
    calls = {"load": 0, "resolve": 0}
    load, resolve = DatasetInfo.load.__func__, Plan.resolve

    def counting_load(cls, folder):
        calls["load"] += 1
        return load(cls, folder)

    def counting_resolve(self, tables):
        calls["resolve"] += 1
        return resolve(self, tables)

    monkeypatch.setattr(DatasetInfo, "load", classmethod(counting_load))
    monkeypatch.setattr(Plan, "resolve", counting_resolve)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tables.method=full", STAGED])
def test_a_command_reads_its_dataset_and_resolves_its_plan_once(tmp_path, counted, method):
    dataset = write_dataset(tmp_path / "data")
    # DeepFM has first-order weights too: two plans, each resolved once.
    config = toy_config(dataset, method, "model={name: deepfm, hidden_units: [8]}")
    for command in (
        lambda: train(config, runs=tmp_path, quiet=True),
        lambda: evaluate(tmp_path / config.name, quiet=True),
        lambda: export_run(tmp_path / config.name),
    ):
        counted.update(load=0, resolve=0)
        command()
        assert counted == {"load": 1, "resolve": 2}


def test_planned_and_trained_tables_are_the_same(tmp_path):
    """A feature that may have many values is one, however few it has on average."""
    dataset = write_dataset(tmp_path / "data")
    info = DatasetInfo.load(dataset)
    info.categorical[1].multi_valued, info.categorical[1].mean_length = True, 1.0
    info.save(dataset)
    config = toy_config(dataset, "tables.pooling=mean")
    run: RunContext = unstarted(config)
    planned = plan_config(config, sizes_of_dataset(dataset)).main
    assert run.schedule.plan is not None and planned is not None
    assert planned.tables == run.schedule.plan.tables
    assert [table.mean_pooling for table in planned.tables][:2] == [False, True]
