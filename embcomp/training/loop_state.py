"""The loop's own variables, as a checkpoint holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class LoopState:
    """With the model, the optimizers and the random state, all that the rest of a run depends on.

    Attributes:
        step: steps done.
        epoch: whole epochs done.
        step_in_epoch: steps done of the current epoch.
        loss_sum: sum of the losses since the training loss was last recorded.
        loss_steps: how many losses that is.
        best_value: the monitored metric's best value, its sign such that more is better.
        best_step: the step that reached it.
        best_valid: the validation record of that step.
        stalled: evaluations in a row without an improvement.
        reductions: how often the plateau rule has reduced the learning rates.
        stopped: why training ended; empty while it goes on.
        train_seconds: time of training steps so far.
        recorded_seconds: `train_seconds` when the training loss was last recorded.
        wall_seconds: time of everything so far, interruptions left out.
        log_sizes: bytes of the run's logs.
        kept_rows: the share of rows that passed learnt thresholds at the end of each epoch; empty
            where a method has none.
        row_order: the version of the loader's order of rows; 2 where a checkpoint does not say.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    best_value: float | None = None
    best_step: int | None = None
    best_valid: dict[str, Any] = field(default_factory=dict)
    stalled: int = 0
    reductions: int = 0
    stopped: str = ""
    train_seconds: float = 0.0
    recorded_seconds: float = 0.0
    wall_seconds: float = 0.0
    log_sizes: dict[str, int] = field(default_factory=dict)
    kept_rows: list[float] = field(default_factory=list)
    row_order: int = 2

    def see(self, value: float | None, valid: dict[str, Any], min_delta: float) -> bool:
        """Take in an evaluation and return whether it is the best so far.

        Args:
            value: the monitored metric, more is better; None where it is undefined.
            valid: the evaluation's record.
            min_delta: by how much the best value must be beaten.
        """
        if value is None or (self.best_value is not None and value <= self.best_value + min_delta):
            if self.best_step is None:  # undefined so far: the last weights are reported
                self.best_valid = valid
            self.stalled += 1
            return False
        self.best_value, self.best_step, self.best_valid = value, self.step, valid
        self.stalled = 0
        return True
