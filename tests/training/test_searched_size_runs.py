"""OptEmbed and Matryoshka through whole runs: fused rows, lazy decay, and what is left at the end."""

from __future__ import annotations

import json

import pytest

from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.training import train
from tests.helpers.training_cases import toy_config

pytestmark = pytest.mark.slow

NUM_VALUES = (900, 300, 9)
ROWS = sum(NUM_VALUES) + 2 * len(NUM_VALUES)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "toy"
    write_toy_dataset(folder, rows=(2000, 200, 200), num_values=NUM_VALUES)
    return folder


def run(dataset, runs, method, *overrides):
    sizes = ("data.batch_size=50", "data.eval_batch_size=200")
    config = toy_config(dataset, f"tables.method={json.dumps(method)}", *sizes, *overrides)
    return train(config, runs=runs, quiet=True)


def test_pruning_does_not_stall_with_fused_rows_that_decay(dataset, tmp_path):
    """Fused kernels leave untouched rows alone; the decay that they are owed does not."""
    kept = {}
    for decay in (0.0, 2.0):
        method = {
            "name": "optembed",
            "prune": "rows",
            "alpha": 0.0002,  # 100 times as much in so short a run
            "threshold_learning_rate": 0.5,
        }
        report = run(
            dataset,
            tmp_path / str(decay),
            method,
            f"train.row_optimizer.weight_decay={decay}",
            "train.stages.retrain.max_steps=1",
        )
        kept[decay] = report.stages[1]["result"]["kept"] / ROWS
        assert report.stages[1]["result"]["bytes"] == report.serve_bytes
    assert kept[0.0] > 0.95
    assert kept[2.0] < 0.7


def test_a_budget_is_met_by_both_methods_and_the_model_evaluates(dataset, tmp_path):
    for method in (
        {"name": "optembed", "generations": 1, "population": 4},
        {"name": "matryoshka", "finetune_epochs": 1},
    ):
        report = run(dataset, tmp_path, method, f"name={method['name']}", "tables.budget=30%")
        assert report.serve_bytes <= 0.3 * report.full_bytes
        assert report.serve_bytes == report.stages[1]["result"]["bytes"]
        assert report.test["auc"] > 0.5
