"""What a stage of a run ended with, as `done.json` of its folder and the report hold it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embcomp.backends.stages import Stage
from embcomp.errors import CheckpointError, one_line
from embcomp.io.json_values import without_nan
from embcomp.training.files.run_checksums import read_checked, write_checked
from embcomp.training.loop_state import LoopState
from embcomp.training.run_folder import StageFolder


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """One finished stage.

    Attributes:
        name: the stage's name.
        steps: training steps done.
        keeps_step: the step whose weights it hands on.
        stopped: why it ended.
        valid: validation metrics of the best step.
        train_seconds: time of the training steps, or of the search.
        wall_seconds: time of everything in the stage, interruptions left out.
        result: what a search found.
        kept_training: of a stage that hands on the best weights or those that it began with, whether
            training was better; None for other stages.
        kept_rows: the share of rows that passed learnt thresholds at the end of each epoch.
    """

    name: str
    steps: int = 0
    keeps_step: int = 0
    stopped: str = ""
    valid: Mapping[str, Any] = field(default_factory=dict)
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    result: Mapping[str, Any] = field(default_factory=dict)
    kept_training: bool | None = None
    kept_rows: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, stage: Stage, state: LoopState, keeps_step: int) -> StageResult:
        """A stage that trained."""
        return cls(
            name=stage.name,
            steps=state.step,
            keeps_step=keeps_step,
            stopped=state.stopped,
            valid=state.best_valid,
            train_seconds=state.train_seconds,
            wall_seconds=state.wall_seconds,
            kept_training=keeps_step > 0 if stage.keeps == "best_or_start" else None,
            kept_rows=list(state.kept_rows),
        )

    @property
    def verdict(self) -> str:
        """Whether a stage's training was worth keeping, for people; empty where none asks."""
        if self.kept_training is None:
            return ""
        if not self.steps:
            return f"{self.name}: nothing was trained"
        if self.kept_training:
            return f"{self.name}: training was kept, as of step {self.keeps_step} of {self.steps}"
        return (
            f"{self.name}: training was not kept, as no evaluation beat what the stage began with"
        )


def write_outcome(place: StageFolder, outcome: StageResult, log_sizes: Mapping[str, int]) -> None:
    """Mark a stage as finished.

    Args:
        place: the stage's folder.
        outcome: what it ended with.
        log_sizes: bytes of the run's logs at its end.
    """
    place.path.mkdir(parents=True, exist_ok=True)
    content = {**dataclasses.asdict(outcome), "log_sizes": dict(log_sizes)}
    write_checked(place.done, json.dumps(without_nan(content), indent=1) + "\n")


def read_stage_result(place: StageFolder) -> tuple[StageResult, dict[str, int]]:
    """A finished stage, and the bytes of the run's logs at its end."""
    try:
        content = json.loads(read_checked(place.done))
        sizes = content.pop("log_sizes")
        return StageResult(**content), sizes
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{place.path} is not a finished stage: {one_line(error)}") from None
