"""What a stage says of its training: kept or not, and how many rows pass thresholds."""

from __future__ import annotations

import pytest

from embcomp.backends.stages import Stage
from embcomp.training.loop_state import LoopState
from embcomp.training.reporting.stage_result import StageResult, read_stage_result, write_outcome
from embcomp.training.run_folder import RunFolder

QUANTIZE = Stage(name="quantize", keeps="best_or_start")


@pytest.mark.parametrize(
    ("steps", "keeps", "kept", "says"),
    [
        (40, 20, True, "quantize: training was kept, as of step 20 of 40"),
        (40, 0, False, "quantize: training was not kept, as no evaluation beat"),
        (0, 0, False, "quantize: nothing was trained"),
    ],
)
def test_a_stage_says_whether_its_training_was_kept(tmp_path, steps, keeps, kept, says):
    result = StageResult.of(QUANTIZE, LoopState(step=steps, stopped="done"), keeps)
    assert result.kept_training is kept
    assert result.verdict.startswith(says)
    place = RunFolder(tmp_path / "run").stage(1, ["dense", "quantize"])
    write_outcome(place, result, {})
    read, _ = read_stage_result(place)
    assert (read.kept_training, read.verdict) == (kept, result.verdict)


def test_stages_that_always_hand_on_what_they_trained_have_no_verdict():
    result = StageResult.of(Stage(name="dense"), LoopState(step=9), 9)
    assert result.kept_training is None
    assert result.verdict == ""


def test_the_kept_share_of_each_epoch_is_part_of_the_result():
    state = LoopState(step=9, kept_rows=[0.9, 0.6])
    assert StageResult.of(Stage(name="supernet"), state, 9).kept_rows == [0.9, 0.6]
