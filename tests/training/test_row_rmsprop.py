"""`rowwise_rmsprop_ar`: FBGEMM's formula, exact resume, and one line where FBGEMM lacks it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType

from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.errors import ConfigError
from embcomp.layers.row_rmsprop import RowWiseRmspropAr
from embcomp.planning.config_plan import plan_config, sizes_of
from embcomp.training import load_model, train
from embcomp.training.checkpoint import checkpoint_folder, load_whole, saved_steps
from embcomp.training.distributed.process import process_group
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.optim.lazy_decay import fused_kernels
from tests.helpers import training_cases
from tests.helpers.plain_rmsprop import PlainRmspropAr
from tests.helpers.training_cases import (
    first_stage,
    first_weights,
    toy_config,
    train_and_load,
    train_on_ranks,
    train_with_plain_torch,
    write_dataset,
)

pytestmark = pytest.mark.slow
HAS_IT = hasattr(EmbOptimType, "ROWWISE_RMSPROP_AR")
needs_it = pytest.mark.skipif(not HAS_IT, reason="rowwise_rmsprop_ar needs fbgemm 1.9")

# Rows that rest for more than 7 steps reach the least share.
RMSPROP = "name: rowwise_rmsprop_ar, learning_rate: 0.02, eps: 0.001, ar_alpha: 5, ema_beta: 0.9, min_shrinkage: 0.3"
OFTEN = ("train.eval_every=3", "train.checkpoint_every=4", "train.epochs=2")


def config_of(dataset: Path, *overrides: str, more: str = "") -> TrainConfig:
    return toy_config(dataset, f"train.row_optimizer={{{RMSPROP}{more}}}", *overrides)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=1e-5)


def write_even(folder: Path) -> Path:
    """Whose rows fill every batch: a row that a rank looks up without counting it decays as others do."""
    write_toy_dataset(folder, rows=(320, 75, 75), num_values=(11, 40, 20))
    return folder


def gone_on(finished: Path, runs: Path) -> Path:
    """A copy of a run as it was at its last checkpoint but one."""
    shutil.copytree(finished, runs / finished.name)
    run = runs / finished.name
    (run / "report.json").unlink()
    *_, before, last = saved_steps(run / "checkpoints")
    shutil.rmtree(checkpoint_folder(run / "checkpoints", last))
    assert before >= 15
    return run


@needs_it
@pytest.mark.parametrize(
    "more",
    ["", ", weight_decay: 0.5"],
    ids=["plain", "lazy decay"],
)
def test_rows_are_those_of_the_formula_however_often_one_evaluates(
    dataset, tmp_path, monkeypatch, more
):
    made = []

    def noting(rows, options):
        made.append(PlainRmspropAr(rows, options))
        return made[-1]

    monkeypatch.setattr(training_cases, "PlainRmspropAr", noting)
    config = config_of(dataset, "train.epochs=2", "train.warmup_steps=4", more=more)
    expected = train_with_plain_torch(config, world_size=1)
    assert min(made[0].decayed) == 0.3 and len(made[0].decayed) > 10
    often = config_of(dataset, "train.warmup_steps=4", *OFTEN, more=more)
    rarely = {"train": config.train.model_copy(update={"eval_every": 1000})}
    assert_close(train_and_load(config.model_copy(update=rarely), tmp_path / "a"), expected)
    train(often, runs=tmp_path / "b", quiet=True)
    last = checkpoint_weights(tmp_path / "b" / "toy")
    assert_close(last, expected)


@needs_it
def test_gradients_are_bounded_before_it_sees_them(dataset, tmp_path):
    quiet = "train.row_optimizer={name: rowwise_rmsprop_ar, eps: 0.01, max_gradient: 0.000001}"
    config = toy_config(dataset, quiet)
    trained = train_and_load(config, tmp_path)
    rows = {
        name: value for name, value in first_weights(config).items() if ".embedding_bags." in name
    }
    assert rows
    for name, value in rows.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=2e-3)


def checkpoint_weights(run: Path) -> dict[str, torch.Tensor]:
    """Of a run's last step, whichever was best."""
    state = {name: torch.empty_like(value) for name, value in load_model(run).state_dict().items()}
    load_whole(checkpoint_folder(run / "checkpoints", saved_steps(run / "checkpoints")[-1]), state)
    return state


@needs_it
@pytest.mark.parametrize("sharding", ["row_wise", "auto"])
def test_two_ranks_train_the_rows_of_the_formula(workers, tmp_path, sharding):
    config = config_of(
        write_even(tmp_path / "data"), f"train.sharding={sharding}", "train.eval_every=1000"
    )
    workers.run(2, train_on_ranks, config, tmp_path)
    found = load_model(tmp_path / "toy").state_dict()
    assert_close(found, train_with_plain_torch(config, world_size=2))


@needs_it
def test_a_run_goes_on_bit_for_bit_from_its_last_checkpoint_but_one(dataset, tmp_path):
    config = config_of(dataset, *OFTEN, more=", weight_decay: 0.1")
    train(config, runs=tmp_path / "whole", quiet=True)
    (tmp_path / "again").mkdir()
    run = gone_on(tmp_path / "whole" / "toy", tmp_path / "again")
    train(config, runs=tmp_path / "again", quiet=True)
    whole = tmp_path / "whole" / "toy"
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    weights = checkpoint_weights(whole)
    for name, value in checkpoint_weights(run).items():
        assert torch.equal(value, weights[name]), name


def shards_of_one_row(config: TrainConfig) -> int:
    """For a pool of workers."""
    with quiet_libraries(), process_group("cpu") as process:
        kernels = fused_kernels(first_stage(config, process).sharded)
        return sum(len(w) == 1 for k in kernels for w in k.split_embedding_weights())


@needs_it
def test_a_run_goes_on_on_fewer_ranks_of_which_one_held_a_single_row(workers, tmp_path):
    config = config_of(write_even(tmp_path / "data"), "train.sharding=row_wise", *OFTEN)
    assert sum(workers.run(4, shards_of_one_row, config)) > 0
    workers.run(4, train_on_ranks, config, tmp_path / "whole")
    whole = checkpoint_weights(tmp_path / "whole" / "toy")
    for ranks in (1, 4):
        (tmp_path / str(ranks)).mkdir()
        run = gone_on(tmp_path / "whole" / "toy", tmp_path / str(ranks))
        workers.run(ranks, train_on_ranks, config, tmp_path / str(ranks))
        assert_close(checkpoint_weights(run), whole)


@needs_it
def test_bytes_of_its_state_are_those_planned(dataset):
    config = config_of(dataset)
    plan = plan_config(config, sizes_of(DatasetInfo.load(dataset)))
    planned = sum(line.optimizer for line in [*plan.lines(), *plan.first_order_lines()])
    with quiet_libraries(), process_group("cpu") as process:
        state = first_stage(config, process).optimizers.combined.state_dict()["state"]
    parts = [
        part.tensor
        for name, states in state.items()
        if name.startswith("fused.")
        for value in states.values()
        for part in value.local_shards()
    ]
    assert sum(part.numel() * part.element_size() for part in parts) == planned > 0


@needs_it
def test_methods_that_update_rows_themselves_refuse_it(dataset):
    config = config_of(dataset, "tables.method=int8")
    refusal = pytest.raises(ConfigError, match="stored integers .*name: rowwise_rmsprop_ar")
    with quiet_libraries(), process_group("cpu") as process, refusal:
        first_stage(config, process)


@pytest.mark.skipif(HAS_IT, reason="this fbgemm has it")
def test_an_fbgemm_without_it_is_named_with_the_install_that_has_it(dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"fbgemm 1\.8.*requirements-cpu-2\.14\.txt") as error:
        train(config_of(dataset), runs=tmp_path, quiet=True)
    assert "\n" not in str(error.value)


def test_rows_that_are_not_sharded_are_refused_with_the_way_out():
    optimizer = RowWiseRmspropAr([torch.nn.Parameter(torch.zeros(2, 4))])
    with pytest.raises(ConfigError, match="shard the model by DistributedModelParallel"):
        optimizer.step()


def test_kernels_are_told_the_step_whatever_they_counted(dataset):
    config = toy_config(dataset, "train.eval_every=2", "train.max_steps=5")
    with quiet_libraries(), process_group("cpu") as process:
        training = first_stage(config, process)
        training.optimizers.begin_after(100)
        kernels = list(fused_kernels(training.sharded))
        batches = iter(training.batches)
        for step in range(4):
            training._train_step(batches)
            assert {int(kernel.iter_cpu) for kernel in kernels} == {101 + step}
            assert {int(kernel.iter) for kernel in kernels} == {101 + step}
            training._evaluate("valid")
            assert all(int(kernel.iter_cpu) > 101 + step for kernel in kernels)
