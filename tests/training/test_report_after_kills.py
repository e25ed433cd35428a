"""Every figure of a report is that of the whole run, whenever it was killed and gone on with."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from embcomp.training import Report, loop, train
from embcomp.training.checkpoint import saved_steps
from embcomp.training.loop import Training
from embcomp.training.stages.search_stage import StageSearch
from tests.helpers.training_cases import toy_config, write_dataset
from tests.training.test_stages import staged_config

pytestmark = pytest.mark.slow

# Each stands for a measured time; all else of a report is the same to the last digit.
TIMED = {"samples_per_second", "train_seconds", "wall_seconds"}
TICK = 1000.0  # far above all that the toy runs really take


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def clock(monkeypatch):
    """A clock that jumps by a tick in every step and in every evaluation of a search."""
    real, ticks = time.perf_counter, [0]

    def ticking(method):
        def run(self, *arguments):
            ticks[0] += 1
            return method(self, *arguments)

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: real() + TICK * ticks[0])
    monkeypatch.setattr(Training, "_phase", ticking(Training._phase))
    monkeypatch.setattr(StageSearch, "evaluate", ticking(StageSearch.evaluate))


def killed_at(patches: pytest.MonkeyPatch, cls: object, method: str, call: int) -> None:
    """End the run when a method has been called so many times."""
    whole, calls = getattr(cls, method), []

    def run_and_die(*arguments):
        result = whole(*arguments)
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        return result

    patches.setattr(cls, method, run_and_die)


def rounded(report: Report) -> dict:
    """A report whose times are in ticks, without what the machine's own speed adds."""
    found = dataclasses.asdict(report)
    for part in (found, *found["stages"]):
        for key in ("train_seconds", "wall_seconds"):
            part[key] = round(part[key] / TICK, 1)
    found["samples_per_second"] = round(found["samples_per_second"], 4)
    return found


def resumed(config, runs: Path, *kills: tuple[object, str, int]) -> Report:
    for kill in kills:
        with pytest.MonkeyPatch.context() as patches:
            killed_at(patches, *kill)
            with pytest.raises(Killed):
                train(config, runs=runs, quiet=True)
    return train(config, runs=runs, quiet=True)


def test_every_field_survives_kills_between_steps_and_at_the_end(dataset, tmp_path, clock):
    config = toy_config(dataset, "train.epochs=2", "train.eval_every=6", "train.checkpoint_every=1")
    whole = train(config, runs=tmp_path / "whole", quiet=True)
    kills = [(Training, "_save", 3), (Training, "_save", 5)]
    found = resumed(config, tmp_path / "killed", *kills, (Report, "save", 1))
    assert rounded(found) == rounded(whole)
    assert whole.train_seconds >= 20 * TICK and whole.steps == 20 and whole.epochs == 2
    # 301 rows in each of two epochs, the last batch of which is short.
    assert whole.samples_per_second == pytest.approx(602 / whole.train_seconds)


def test_the_speed_of_a_window_of_losses_survives_a_kill_inside_it(dataset, tmp_path, clock):
    config = toy_config(dataset, "train.checkpoint_every=1", "train.log_every=4")
    train(config, runs=tmp_path / "whole", quiet=True)
    resumed(config, tmp_path / "killed", (Training, "_save", 3))
    whole, killed = (
        [json.loads(x) for x in (tmp_path / name / "toy" / "timing.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    )
    for one, other in zip(whole, killed, strict=True):
        assert other["train_rows_per_second"] == pytest.approx(
            one["train_rows_per_second"], rel=0.01
        )


@pytest.mark.long
@pytest.mark.parametrize("method", ["optembed", "matryoshka"])
def test_the_evaluations_and_the_seconds_of_a_search_survive_kills(
    dataset, tmp_path, clock, method
):
    config = staged_config(dataset, method)
    whole = train(config, runs=tmp_path / "whole", quiet=True)
    kills = [(StageSearch, "save", 1), (StageSearch, "save", 1), (Training, "_save", 2)]
    found = resumed(config, tmp_path / "killed", *kills)
    assert rounded(found) == rounded(whole)
    search = next(stage for stage in whole.stages if "evaluations" in stage["stopped"])
    assert search["wall_seconds"] >= 4 * TICK


def test_a_kill_before_old_checkpoints_went_leaves_none_of_them(dataset, tmp_path):
    config = toy_config(dataset, "train.checkpoint_every=1", "train.keep_checkpoints=2")
    saves = 10  # of ten steps, the last with the evaluation that ends the run
    resumed(config, tmp_path, (loop, "save_checkpoint", saves))
    assert len(saved_steps(tmp_path / "toy" / "checkpoints")) == 2
