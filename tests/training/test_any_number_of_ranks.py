"""A config means the same on 1, 2 and 4 ranks: the rows of every step, losses, metrics, weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from embcomp.config.train_config import TrainConfig
from embcomp.training import Report, load_model, train
from embcomp.training.loop import Training
from tests.helpers.long import long_but
from tests.helpers.training_cases import toy_config, write_dataset
from tests.training.test_stages import staged_config

pytestmark = pytest.mark.slow

CASES = {
    "rowwise adagrad": ("train.row_optimizer={name: rowwise_adagrad}",),
    "adagrad, decay, by rows": (
        "train.row_optimizer={name: adagrad, weight_decay: 0.01}",
        "train.sharding=row_wise",
    ),
    "dense adam": ("train.row_optimizer={name: adam, mode: dense, learning_rate: 0.01, l2: 0.01}",),
    "in order": ("data.shuffle=false", "train.row_optimizer={name: sgd, learning_rate: 0.5}"),
    "whole batches": ("data.drop_last=true",),
}
KEPT = ("adagrad, decay, by rows", "dense adam", "whole batches")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def train_and_note(config: TrainConfig, runs: Path) -> list[list[tuple[float, ...]]]:
    """For a pool of workers: trains, and returns the real rows that a rank saw in each step."""
    seen: list[list[tuple[float, ...]]] = []
    phase = Training._phase

    def noting(self, phase_name, scale, batches):
        def noted():
            for batch in batches:
                rows = len(batch.labels) if batch.num_valid is None else batch.num_valid
                dense = torch.cat([batch.dense, batch.labels[:, None]], dim=1)[:rows]
                seen.append([tuple(row) for row in dense.tolist()])
                yield batch

        return phase(self, phase_name, scale, noted())

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Training, "_phase", noting)
        train(config, runs=runs, quiet=True)
    return seen


def on_ranks(workers, world_size: int, config: TrainConfig, runs: Path):
    """The rows of each step, and what the run recorded and left."""
    if world_size == 1:
        by_rank = [train_and_note(config, runs)]
    else:
        by_rank = workers.run(world_size, train_and_note, config, runs)
    folder = runs / config.name
    steps = [sorted(row for rank in step for row in rank) for step in zip(*by_rank)]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return steps, records, Report.load(folder), load_model(folder).state_dict()


def close(found, expected) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            close(found[key], expected[key]) for key in expected
        )
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=1e-3, abs=2e-4)
    return found == expected


@pytest.mark.parametrize("case", long_but(KEPT, CASES))
def test_rows_losses_metrics_and_weights_are_those_of_one_process(workers, dataset, tmp_path, case):
    config = toy_config(
        dataset, "train.epochs=2", "train.eval_every=5", "train.log_every=1", *CASES[case]
    )
    one = on_ranks(workers, 1, config, tmp_path / "1")
    for world_size in (2, 4):
        many = on_ranks(workers, world_size, config, tmp_path / str(world_size))
        assert many[0] == one[0]
        assert len(many[1]) == len(one[1]) > 20
        for record, expected in zip(many[1], one[1]):
            assert close(record, expected), (world_size, record, expected)
        assert many[2].best_step == one[2].best_step
        assert close(many[2].test, one[2].test)
        for name, weight in one[3].items():
            torch.testing.assert_close(many[3][name], weight, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("method", long_but(["optembed"], ["dnis", "optembed"]))
def test_methods_that_search_see_the_same_search_rows_too(workers, dataset, tmp_path, method):
    config = staged_config(dataset, method, "data.drop_last=true", "train.log_every=1")
    one = on_ranks(workers, 1, config, tmp_path / "1")
    many = on_ranks(workers, 4, config, tmp_path / "4")
    assert many[0] == one[0]
    for stage, expected in zip(many[2].stages, one[2].stages):
        assert stage["keeps_step"] == expected["keeps_step"]
        assert close(stage["result"], expected["result"])
    assert close(many[2].test, one[2].test)
    assert many[2].serve_bytes == one[2].serve_bytes


def test_search_rows_that_fill_no_batch_are_one_on_any_number_of_ranks(workers, dataset, tmp_path):
    config = staged_config(dataset, "dnis", "data.search_share=0.05", "data.batch_size=32")
    one = on_ranks(workers, 1, config, tmp_path / "1")
    many = on_ranks(workers, 4, config, tmp_path / "4")
    assert many[0] == one[0] and 15 in [len(step) for step in one[0]]
    assert close(many[2].test, one[2].test)
