"""What a person sees while a run goes on: a live bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import Self

from embcomp.training.reporting.evaluation import Evaluation
from embcomp.training.reporting.metrics import Metrics


class RunConsole:
    """Prints a run's progress; silent on every rank but the first.

    Args:
        enabled: whether to print at all.
        name: the run's name.
        stream: where to print.
    """

    def __init__(self, *, enabled: bool, name: str, stream: TextIO | None = None) -> None:
        self._enabled = enabled
        self._total = 0
        self._stage = ""
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn(name),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._bar = self._progress.add_task(name, total=None, note="")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def start(self, total_steps: int, step: int, stage: str = "") -> None:
        """Show the bar.

        Args:
            total_steps: steps of the stage.
            step: steps done already.
            stage: its name, where the run has several.
        """
        self._total, self._stage = total_steps, f"{stage}: " if stage else ""
        self._progress.update(self._bar, total=total_steps, completed=step)
        self._progress.start()

    def step(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._bar, completed=step)

    def loss(self, step: int, loss: float, rows_per_second: float) -> None:
        """A window's mean training loss."""
        note = f"loss {loss:.4f}  {rows_per_second:,.0f} rows/s"
        self._progress.update(self._bar, note=note)
        if not self._console.is_terminal:
            self.say(f"{self._stage}step {step}/{self._total}  {note}")

    def evaluation(self, split: str, step: int, evaluation: Evaluation) -> None:
        """An evaluation's result."""
        metrics = evaluation.metrics
        gauc = "" if metrics.gauc != metrics.gauc else f"  gauc {metrics.gauc:.6f}"
        self.say(
            f"{self._stage}step {step}  {split}: auc {metrics.auc:.6f}{gauc}  log loss {metrics.log_loss:.6f}  "
            f"ne {metrics.normalized_entropy:.4f}  calibration {metrics.calibration:.4f}  "
            f"unseen ids {evaluation.unseen_rate:.2%}{_weighted(evaluation.weighted)}"
        )

    def say(self, text: str) -> None:
        """One line."""
        if self._enabled:
            self._console.print(text, markup=False)


def _weighted(metrics: Metrics | None) -> str:
    if metrics is None:
        return ""
    gauc = "" if metrics.gauc != metrics.gauc else f"  gauc {metrics.gauc:.6f}"
    return (
        f"  weighted: auc {metrics.auc:.6f}{gauc}  log loss {metrics.log_loss:.6f}  "
        f"calibration {metrics.calibration:.4f}"
    )
