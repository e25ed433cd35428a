"""Parts of the training loop: initial rows, overlapped steps, clipping, stopping, records."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.config.train_config import PlateauConfig, TrainConfig
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.training import load_model, loop, train
from embcomp.training.build import build_model, shard_model
from embcomp.training.checkpoint import model_state
from embcomp.training.distributed.process import Process, process_group
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.loop_state import LoopState
from embcomp.training.optim.initial_rows import initialize_rows
from embcomp.training.optim.optimizers import reduced
from embcomp.training.reporting.evaluation import count_unseen
from embcomp.training.steps import PipelinedSteps
from tests.helpers.training_cases import (
    first_weights,
    toy_config,
    train_and_load,
    train_with_plain_torch,
    write_dataset,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def local_pieces(config: TrainConfig) -> dict[str, list[tuple[list[int], torch.Tensor]]]:
    """For a pool of workers: what each rank holds of a new model, and where it belongs."""
    with quiet_libraries(), process_group("cpu") as process:
        info = ParquetLoader(config.data.path, "train", batch_size=1).info
        unsharded = build_model(config, info, torch.device("meta"))
        state = model_state(shard_model(unsharded, config, process))
    return {
        name: [(s.metadata.shard_offsets, s.tensor) for s in value.local_shards()]
        if hasattr(value, "local_shards")
        else [([0] * value.dim(), value)]
        for name, value in state.items()
    }


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise", "table_wise", "data_parallel"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_initial_weights_do_not_depend_on_ranks_and_sharding(
    workers, dataset, sharding, world_size
):
    rows = "train.row_optimizer={name: adagrad}"
    whole = first_weights(toy_config(dataset, rows))
    config = toy_config(dataset, rows, f"train.sharding={sharding}")
    covered = dict.fromkeys(whole, 0)
    for rank in workers.run(world_size, local_pieces, config):
        for name, pieces in rank.items():
            for offsets, piece in pieces:
                place = tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape))
                assert torch.equal(whole[name][place], piece), name
                covered[name] += piece.numel()
    assert all(covered[name] >= weight.numel() for name, weight in whole.items())


def test_initial_rows_of_a_long_table_continue_over_blocks_and_differ():
    def draw(weight: torch.Tensor, name: str = "t") -> torch.Tensor:
        init = torch.nn.init.normal_
        initialize_rows(weight, init, seed=1, name=name, used_columns=3)
        return weight

    table = draw(torch.ones(150_000, 4))
    assert torch.equal(table[:, 3], torch.zeros(150_000))
    assert table[:, :3].unique().numel() > 400_000
    assert table[:, :3].std() == pytest.approx(1, abs=0.01)
    assert not torch.equal(draw(torch.ones(9, 4), "t"), draw(torch.ones(9, 4), "u"))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draw(torch.ones(9, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_the_init_of_the_config_replaces_that_of_the_method(dataset):
    config = toy_config(dataset, "tables.init={name: normal, scale: 0.0001}")
    rows = first_weights(config)["tables.rows.embedding_bags.C1.weight"]
    assert 0.5e-4 < rows.std() < 2e-4


def train_pipelined(config: TrainConfig, runs: Path) -> int:
    """For a pool of workers: trains with overlapped steps; how many modules were pipelined."""
    made: list[PipelinedSteps] = []

    def make_steps(training: loop.Training, *, pipelined: bool) -> PipelinedSteps:
        made.append(
            PipelinedSteps(training.sharded, training.updates, training.process, training.precision)
        )
        return made[0]

    plain, loop.make_steps = loop.make_steps, make_steps
    try:
        train(config, runs=runs, quiet=True)
    finally:
        loop.make_steps = plain
    return len(made[0].pipeline._pipelined_modules)


@pytest.mark.parametrize("world_size", [1, 2])
def test_overlapped_steps_equal_plain_ones_around_evaluations_too(
    workers, dataset, tmp_path, world_size
):
    config = toy_config(
        dataset,
        "train.eval_every=4",
        "train.row_optimizer={name: sgd, learning_rate: 0.5, weight_decay: 0.02}",
        "train.sharding=table_wise",
        "train.epochs=2",
    )
    pipelined = workers.run(world_size, train_pipelined, config, tmp_path)
    assert pipelined == [2] * world_size  # the tables and the first-order tables
    expected = train_with_plain_torch(config, world_size)
    last = load_model(tmp_path / "toy", step=20)
    for name, found in last.state_dict().items():
        assert torch.allclose(found, expected[name], atol=2e-6), name


def test_max_gradient_bounds_what_a_step_does_to_a_row(dataset, tmp_path):
    def moved(runs: str, limit: str) -> float:
        config = toy_config(
            dataset,
            "train.max_steps=1",
            f"train.row_optimizer={{name: sgd, learning_rate: 1, max_gradient: {limit}}}",
        )
        after = train_and_load(config, tmp_path / runs)
        before = first_weights(config)
        rows = [name for name in after if "embedding_bags" in name]
        return max(float((after[name] - before[name]).abs().max()) for name in rows)

    # The bound acts on each of a batch's 32 rows before they are summed.
    assert moved("bounded", "1e-7") <= 33e-7
    assert moved("free", "null") > 1e-4


def test_training_stops_early_and_learning_rates_fall_when_the_metric_stalls(dataset, tmp_path):
    config = toy_config(
        dataset,
        "train.epochs=9",
        "train.min_delta=1",  # nothing after the first evaluation counts as better
        "train.early_stop={patience: 3}",
        "train.plateau={factor: 0.1}",
    )
    report = train(config, runs=tmp_path, quiet=True)
    assert report.epochs == 4 and report.best_step == 10
    assert report.stopped == "auc has not improved in 3 evaluations"
    state = json.loads((tmp_path / "toy/checkpoints/step-0000000040/state.json").read_text())
    assert state["reductions"] == 3


def test_state_counts_improvements_and_ignores_undefined_values():
    state = LoopState(step=1)
    assert not state.see(None, {"auc": None}, 1e-3)
    assert (state.stalled, state.best_step, state.best_valid) == (1, None, {"auc": None})
    assert state.see(0.5, {"auc": 0.5}, 1e-3)
    state.step = 2
    assert not state.see(0.5005, {}, 1e-3)
    assert not state.see(None, {}, 1e-3)
    assert (state.stalled, state.best_step, state.best_valid) == (2, 1, {"auc": 0.5})
    assert state.see(0.6, {}, 1e-3)
    assert (state.stalled, state.best_step) == (0, 2)


def test_learning_rates_fall_to_the_floor_and_never_rise():
    plateau = PlateauConfig(factor=0.1, min_learning_rate=1e-6)
    assert reduced(1e-3, 2, plateau) == pytest.approx(1e-5)
    assert reduced(1e-3, 9, plateau) == 1e-6
    assert reduced(1e-8, 1, plateau) == 1e-8
    assert reduced(1e-3, 5, None) == 1e-3


def test_unseen_ids_are_counted_by_feature_among_the_real_rows():
    sparse = KeyedJaggedTensor(
        keys=["a", "b"],
        values=torch.tensor([1, 5, 1, 1, 1, 7, 1]),
        lengths=torch.tensor([1, 1, 1, 3, 0, 1]),
    )
    assert count_unseen(sparse, 3).tolist() == [[2, 3], [3, 4]]
    assert count_unseen(sparse, 2).tolist() == [[1, 2], [2, 3]]


def test_unseen_rates_and_metrics_of_a_run_are_those_of_the_dataset(dataset, tmp_path):
    report = train(toy_config(dataset, "train.max_steps=1"), runs=tmp_path, quiet=True)
    info = ParquetLoader(dataset, "test", batch_size=1).info
    assert report.test is not None
    rates = info.splits["test"].unseen_rate
    assert report.test["unseen_rate_by_feature"] == pytest.approx(rates, abs=1e-12)
    assert report.test["rows"] == info.splits["test"].rows
    assert report.test["label_rate"] == pytest.approx(info.splits["test"].label_rate)
    assert math.isfinite(report.test["gauc"])


def test_a_run_leaves_its_records_and_prints_plain_lines(dataset, tmp_path, capsys):
    config = toy_config(dataset)
    train(config, runs=tmp_path)
    run = tmp_path / "toy"
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    kinds = [(record["kind"], record["step"]) for record in records]
    assert kinds == [*[("train", s) for s in (3, 6, 9, 10)], ("valid", 10), ("test", 10)]
    assert len((run / "timing.jsonl").read_text().splitlines()) == 4
    assert list((run / "tensorboard").iterdir())
    assert {"config.yaml", "dataset.json", "report.json"} <= {p.name for p in run.iterdir()}
    printed = capsys.readouterr().err
    assert "step 3/10  loss" in printed and "test: auc" in printed
    assert "\x1b" not in printed


def test_a_run_without_tensorboard_leaves_the_other_records(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    train(toy_config(dataset, "train.max_steps=1"), runs=tmp_path, quiet=True)
    assert not (tmp_path / "toy" / "tensorboard").exists()
    assert (tmp_path / "toy" / "metrics.jsonl").stat().st_size > 0


def test_the_bytes_of_a_report_are_those_of_the_tables(dataset, tmp_path):
    config = toy_config(
        dataset,
        "tables={embedding_dim: 8, method: {name: hash, collisionless: 0}, budget: 40%}",
        "train.max_steps=1",
    )
    report = train(config, runs=tmp_path, quiet=True)
    tables = load_model(tmp_path / "toy").get_submodule("tables")
    counted = sum(t.numel() * t.element_size() for t in tables.serving_tensors().values())
    assert report.serve_bytes == counted
    assert report.full_bytes == 4 * 8 * sum((62, 32, 10))
    assert report.compression == report.full_bytes / counted >= 2.5


def test_batches_must_divide_over_the_ranks(dataset):
    from embcomp.errors import ConfigError
    from embcomp.training.data import training_batches

    config = toy_config(dataset)
    info = ParquetLoader(dataset, "train", batch_size=1).info
    process = Process(rank=0, world_size=3, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="cannot be shared out evenly to 3 ranks"):
        training_batches(config, info, process)
