"""Optimizers whose states exist before their first step, so that every checkpoint can be resumed."""

from __future__ import annotations

import pytest

from embcomp.training import train
from embcomp.training.distributed.process import process_group
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.loop import Training
from tests.helpers.long import long_but
from tests.helpers.training_cases import first_stage, toy_config, write_dataset
from tests.training.test_stages import staged_config

pytestmark = pytest.mark.slow

OPTIMIZERS = (
    "train.dense_optimizer={name: adam, weight_decay: 0.1}",
    "train.dense_optimizer={name: adamw, weight_decay: 0.1}",
    "train.dense_optimizer={name: adagrad, weight_decay: 0.1}",
    "train.dense_optimizer={name: sgd, momentum: 0.9, weight_decay: 0.1}",
    "train.dense_optimizer={name: sgd}",
)
ROWS = (
    "train.row_optimizer={name: rowwise_adagrad}",
    "train.row_optimizer={name: adam, mode: dense, weight_decay: 0.1}",
    "train.row_optimizer={name: adagrad, mode: dense}",
    "train.row_optimizer={name: sgd, mode: dense}",
)
# Each of these stages begins with a checkpoint of step 0, so that no step may be needed before it.
STAGES = {"pq": ["codes"], "lr2vq": ["low_rank", "quantize", "codes"]}


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def after_saving(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """Kills a run just after the checkpoint of a step of a stage."""
    save = Training._save

    def save_and_die(self: Training) -> None:
        save(self)
        if self.stage.name == stage and self.state.step == step:
            raise Killed

    monkeypatch.setattr(Training, "_save", save_and_die)


def shapes(state: dict) -> dict:
    return {
        key: shapes(value) if isinstance(value, dict) else getattr(value, "shape", type(value))
        for key, value in state.items()
    }


@pytest.mark.parametrize("dense", OPTIMIZERS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_first_step_makes_no_state_that_was_not_there(dataset, dense, rows):
    config = toy_config(dataset, dense, rows)
    with quiet_libraries(), process_group("cpu") as process:
        training = first_stage(config, process)
        before = shapes(training.optimizers.combined.state_dict()["state"])
        training._train_step(iter(training.batches))
        assert shapes(training.optimizers.combined.state_dict()["state"]) == before
        assert before or dense == OPTIMIZERS[-1]


@pytest.mark.parametrize(
    ("method", "dense"),
    long_but(
        [("lr2vq", OPTIMIZERS[0])],
        [("lr2vq", OPTIMIZERS[0]), *(("pq", dense) for dense in OPTIMIZERS)],
    ),
)
def test_a_run_killed_at_step_0_of_every_stage_ends_as_if_nothing_had_happened(
    dataset, tmp_path, monkeypatch, method, dense
):
    config = staged_config(dataset, method, dense)
    train(config, runs=tmp_path / "whole", quiet=True)
    for stage in STAGES[method]:
        with monkeypatch.context() as patches:
            after_saving(patches, stage, 0)
            with pytest.raises(Killed):
                train(config, runs=tmp_path / "killed", quiet=True)
    train(config, runs=tmp_path / "killed", quiet=True)
    whole, killed = (tmp_path / name / method for name in ("whole", "killed"))
    assert (whole / "metrics.jsonl").read_bytes() == (killed / "metrics.jsonl").read_bytes()
