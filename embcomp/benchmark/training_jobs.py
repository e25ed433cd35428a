"""What the trials of a benchmark's studies stand for: planned trainings, each in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import Trial
from typing_extensions import override

from embcomp.benchmark.benchmark_config import BenchmarkConfig
from embcomp.benchmark.planned_runs import BITS, Kind, PlannedRun
from embcomp.io.atomic_files import write_atomically
from embcomp.search.evaluators.base import TrialHandle, TrialResult
from embcomp.search.evaluators.training_evaluator import Slot, TrainingRun
from embcomp.search.trials.worker import TrialRunner

RUN = "run"
"""The one parameter of a trial: the number of its training."""
DISTRIBUTIONS: Mapping[str, BaseDistribution] = {RUN: IntDistribution(0, 2**BITS - 1)}
FOLDERS: Mapping[Kind, str] = {"tuning": "tuning", "final": "finals"}


class PlannedTrainings(TrialRunner):
    """Trains what is planned.

    Args:
        config: the benchmark.
        runs: what is planned, each once.
        home: the benchmark's folder.
        slots: what trainings may use.
    """

    def __init__(
        self,
        config: BenchmarkConfig,
        runs: Sequence[PlannedRun],
        home: Path,
        slots: Sequence[Slot],
    ) -> None:
        self._config, self._home, self._slots = config, home, slots
        self._runs = {run.number: run for run in runs}
        self._running: list[TrainingRun] = []
        self.planned = [{RUN: run.number} for run in runs]

    @override
    def start(self, trial: Trial, slot: int) -> TrialHandle:
        run, processes = self._runs[trial.params[RUN]], self._config.processes
        folder = self._home / FOLDERS[run.kind]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{run.name}.yaml"
        write_atomically(path, run.config.to_yaml())
        started = TrainingRun(
            config_path=path,
            name=run.name,
            runs=folder,
            slot=self._slots[slot],
            quality=self._config.quality,
            scored=run.kind == "final",
            world_size=processes.world_size,
            timeout=processes.timeout if run.kind == "tuning" else None,
        )
        self._running = [other for other in self._running if other.is_running] + [started]
        return started

    @override
    def line(self, trial: Trial, outcome: TrialResult, what: str) -> str:
        run = self._runs[trial.params[RUN]]
        quality = self._config.quality
        score = "" if outcome.quality is None else f"validation {quality} {outcome.quality:.6f}"
        parts = [what, outcome.message, score, f"{outcome.seconds:.0f} s"]
        return f"{run.label}: {', '.join(part for part in parts if part)}"

    def close(self) -> None:
        """End what still runs."""
        for run in self._running:
            if run.is_running:
                run.detach()
