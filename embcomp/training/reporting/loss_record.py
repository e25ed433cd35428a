"""The training loss between two lines of the log: its mean over steps and ranks, and its speed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from embcomp.errors import EmbcompError
from embcomp.training.distributed.process import Process
from embcomp.training.loop_state import LoopState


class LossRecord:
    """Losses since the last line, whose sum the loop's state holds for the next checkpoint.

    Args:
        state: the loop's variables, fresh or from a checkpoint.
        process: the process group.
        suspect: says what of the present batch may have made a loss overflow; may be empty.
    """

    def __init__(
        self, state: LoopState, process: Process, suspect: Callable[[], str] = lambda: ""
    ) -> None:
        self._state, self._process, self._suspect = state, process, suspect
        self._pending: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Take in a step's loss; on devices other than the CPU without waiting for it."""
        self._pending.append(loss)
        if self._process.device.type == "cpu":
            self._collect()

    def share(self) -> None:
        """Make the sum of losses the mean over ranks: a checkpoint holds it for all of them."""
        self._collect()
        total = torch.tensor(self._state.loss_sum, dtype=torch.float64, device=self._process.device)
        dist.all_reduce(total)
        self._state.loss_sum = total.item() / self._process.world_size

    def take(self, batch_size: int) -> tuple[float, float] | None:
        """The mean loss of all ranks and the rows per second since the last call; None if no step.

        Args:
            batch_size: rows of a step.
        """
        begun, state = time.perf_counter(), self._state
        self.share()
        if not state.loss_steps:
            return None
        loss = state.loss_sum / state.loss_steps
        state.train_seconds += time.perf_counter() - begun
        speed = state.loss_steps * batch_size / (state.train_seconds - state.recorded_seconds)
        state.recorded_seconds = state.train_seconds
        state.loss_sum, state.loss_steps = 0.0, 0
        return loss, speed

    def _collect(self) -> None:
        for loss in self._pending:
            value = loss.item()
            if not math.isfinite(value):
                raise EmbcompError(
                    f"the training loss became {value} near step {self._state.step + 1}; lower the "
                    f"learning rates or set train.clip_norm{self._suspect()}"
                )
            self._state.loss_sum += value
            self._state.loss_steps += 1
        self._pending.clear()
