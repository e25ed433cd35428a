"""One worker's part in a benchmark: tune, train what counts, put the result together.

Each phase is a study whose trials are planned: a round of tuning, or a seed of the final runs. What a
phase plans follows from the phases before it, so that workers agree without talking, and a benchmark
that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna
from optuna.pruners import NopPruner
from optuna.storages import BaseStorage

from embcomp.benchmark.benchmark_progress import BenchmarkConsole
from embcomp.benchmark.cells import Cell, PreparedBenchmark, view_folder
from embcomp.benchmark.final_scores import draws_of
from embcomp.benchmark.planned_runs import (
    PlannedRun,
    final_run,
    is_shortened,
    tuning_run,
    without_repeats,
)
from embcomp.benchmark.seed_halving import Standing, going_on
from embcomp.benchmark.training_jobs import DISTRIBUTIONS, RUN, PlannedTrainings
from embcomp.benchmark.tuning import TuningTrial, best_of, propose, round_sizes
from embcomp.config.train_config import is_loss
from embcomp.search.attempts import latest_attempts
from embcomp.search.evaluators.base import TrialResult
from embcomp.search.evaluators.dataset_view import write_view
from embcomp.search.evaluators.training_evaluator import Slot, full_steps, search_steps
from embcomp.search.prepared import dataset_digest
from embcomp.search.trials.storage import open_study
from embcomp.search.trials.trial_queue import SigningSampler, TrialQueue
from embcomp.search.trials.worker import OUTCOME, Worker

_HALVING_DRAWS = 400
_TUNING_SHARE = 0.5
"""Of the hours, that trials which tune may take beyond their first round."""


@dataclass(frozen=True, kw_only=True)
class FinalRun:
    """A run that counted, and what became of it."""

    run: PlannedRun
    outcome: TrialResult


@dataclass(frozen=True, kw_only=True)
class BenchmarkOutcome:
    """What the trainings of a benchmark came to.

    Attributes:
        tried: what tuned each cell, in the order of the benchmark's cells.
        finals: the runs that counted, failed ones included.
        losers: cells that got no more seeds, being certainly behind.
        cut_short: what hours did not suffice for, for people.
    """

    tried: list[list[TuningTrial]]
    finals: list[FinalRun]
    losers: list[Cell] = field(default_factory=list)
    cut_short: list[str] = field(default_factory=list)


class BenchmarkRun:
    """Goes on with what the studies hold already.

    Args:
        prepared: the benchmark.
        home: its folder.
        storage: where its studies lie.
        console: sees it go on.
        slots: what trainings may use.
        hours: what it may take on this machine; None trains every seed of every cell.
    """

    def __init__(
        self,
        prepared: PreparedBenchmark,
        home: Path,
        storage: BaseStorage,
        console: BenchmarkConsole,
        slots: Sequence[Slot],
        hours: float | None = None,
    ) -> None:
        self._prepared, self._config = prepared, prepared.config
        self._home, self._storage = home, storage
        self._console, self._slots = console, slots
        self._dataset = dataset_digest(prepared.base.data.path)
        self._allowed = None if hours is None else hours * 3600 * len(slots)
        self._spent = 0.0
        self._ended = 0
        self._cut_short: list[str] = []

    @property
    def dataset(self) -> str:
        """The dataset's digest."""
        return self._dataset

    def train(self) -> BenchmarkOutcome:
        """Tune every cell, then train the best of each on one seed after another."""
        view = view_folder(self._home)
        rows = self._config.fidelity.valid_rows
        write_view(self._prepared.base.data.path, view, rows)
        tried = self._tune(str(view.resolve()))
        best = [best_of(self._config, each) for each in tried]
        cells = [
            (cell, found) for cell, found in zip(self._prepared.cells, best) if found is not None
        ]
        finals: list[FinalRun] = []
        losers: list[Cell] = []
        left = [cell for cell, _ in cells]
        for place, seed in enumerate(self._config.final_seeds):
            if place and self._allowed is not None:
                left, lost = self._separated(left, finals)
                losers += lost
            if not left:
                break
            runs = [
                final_run(self._prepared, cell, found.tuned, seed, dataset=self._dataset)
                for cell, found in cells
                if cell in left
            ]
            seconds = self._final_seconds(tried, finals)
            still = sum(seconds[cell.label] for cell in left) * (self._config.seeds - place - 1)
            outcomes = self._phase(f"seed {seed}", runs, still=still, seconds=seconds)
            finals += [FinalRun(run=run, outcome=outcomes[run.number]) for run in runs]
        return BenchmarkOutcome(
            tried=tried, finals=finals, losers=losers, cut_short=self._cut_short
        )

    def _tune(self, view: str) -> list[list[TuningTrial]]:
        prepared, config = self._prepared, self._config
        tried: list[list[TuningTrial]] = [[] for _ in prepared.cells]
        sizes = round_sizes(config)
        for place, size in enumerate(sizes):
            if place and not self._has_time_for(tried, size):
                self._cut_short.append(
                    f"each method was tuned with {len(tried[0])} of {config.tuning.trials} trials"
                )
                break
            planned = [
                tuning_run(prepared, cell, tuned, view=view, dataset=self._dataset)
                for cell, past in zip(prepared.cells, tried)
                for tuned in propose(prepared, cell, past, size)
            ]
            later = sum(sizes[place + 1 :]) + config.seeds * self._steps_ratio()
            seconds = self._trial_seconds(tried)
            still = later * sum(seconds.get(cell.label, 0.0) for cell in prepared.cells)
            outcomes = self._phase(f"tuning {place + 1}", planned, still=still, seconds=seconds)
            for cell, past in zip(prepared.cells, tried):
                past += [
                    TuningTrial(
                        tuned=run.tuned,
                        quality=outcomes[run.number].quality,
                        seconds=outcomes[run.number].seconds,
                        failure=_why(outcomes[run.number]),
                    )
                    for run in planned
                    if run.cell is cell
                ]
        return tried

    def _has_time_for(self, tried: Sequence[Sequence[TuningTrial]], size: int) -> bool:
        if self._allowed is None:
            return True
        next_round = size * sum(self._trial_seconds(tried).values())
        return self._spent + next_round <= _TUNING_SHARE * self._allowed

    def _separated(
        self, left: Sequence[Cell], finals: Sequence[FinalRun]
    ) -> tuple[list[Cell], list[Cell]]:
        """The cells that get another seed, and those that are certainly behind."""
        assert self._allowed is not None
        standings = self.standings(left, finals, resamples=_HALVING_DRAWS)
        time_left = self._allowed - self._spent
        kept, lost = going_on(standings, seconds_left=time_left, seed=self._config.seed)
        for cell in lost:
            self._console.log(f"{cell.label} gets no more seeds: it is certainly behind")
        dropped = [cell for cell in left if cell not in kept and cell not in lost]
        if dropped:
            self._cut_short.append(
                f"no time was left for another seed of {', '.join(c.label for c in dropped[:5])}"
                + (f" and {len(dropped) - 5} more" if len(dropped) > 5 else "")
            )
            self._console.log(self._cut_short[-1])
        return kept, lost

    def standings(
        self, cells: Sequence[Cell], finals: Sequence[FinalRun], *, resamples: int
    ) -> list[Standing]:
        """How cells stand after the final runs that there are.

        Args:
            cells: of which to say so.
            finals: the runs.
            resamples: draws of rows.
        """
        draws = draws_of(self._home, finals, resamples=resamples, seed=self._config.seed)
        found = []
        for cell in cells:
            own = [f for f in finals if f.run.cell is cell and f.outcome.quality is not None]
            found.append(
                Standing(
                    cell=cell,
                    aucs={f.run.seed: f.outcome.details["test"]["auc"] for f in own},
                    draws={f.run.seed: draws[f.run.name] for f in own if f.run.name in draws},
                    seconds=sum(f.outcome.seconds for f in own) / max(1, len(own)),
                )
            )
        return found

    def _phase(
        self, name: str, runs: Sequence[PlannedRun], *, still: float, seconds: dict[str, float]
    ) -> dict[int, TrialResult]:
        """Train what a phase plans, or what is left of it; the outcome of each by its number.

        Args:
            name: the phase.
            runs: what it plans.
            still: seconds that the phases after it take, as far as is known.
            seconds: of a training of each cell, by label, as far as is known.
        """
        config, planned = self._config, without_repeats(runs)
        direction = "minimize" if is_loss(config.quality) else "maximize"
        known = {"benchmark": config.name, "dataset": self._dataset}
        title = f"{config.name} {name}"
        study = open_study(self._storage, title, [direction], SigningSampler(), NopPruner(), known)
        jobs = PlannedTrainings(config, planned, self._home, self._slots)
        queue = TrialQueue(
            study,
            self._storage,
            DISTRIBUTIONS,
            count=len(planned),
            retries=config.processes.retries,
            planned=jobs.planned,
        )
        total = len(self._prepared.cells) * (config.tuning.trials + config.seeds)
        listener = _PhaseListener(
            self._console, study, planned, before=self._ended, total=total, slots=len(self._slots)
        )
        listener.expect(still, seconds)
        self._console.begin(f"{title}: {len(planned)} trainings")
        try:
            Worker(queue, jobs, listener, len(self._slots)).run()
        finally:
            jobs.close()
        outcomes = outcomes_of(study, planned)
        self._ended += len(planned)
        self._spent += sum(each.seconds for each in outcomes.values())
        return outcomes

    def _trial_seconds(self, tried: Sequence[Sequence[TuningTrial]]) -> dict[str, float]:
        """Mean seconds of a trial of each cell that has some."""
        return {
            cell.label: sum(each.seconds for each in past) / len(past)
            for cell, past in zip(self._prepared.cells, tried)
            if past
        }

    def _final_seconds(
        self, tried: Sequence[Sequence[TuningTrial]], finals: Sequence[FinalRun]
    ) -> dict[str, float]:
        """Seconds of a final run of each cell: as the last took, else by a trial's steps."""
        ratio = self._steps_ratio()
        known = {label: each * ratio for label, each in self._trial_seconds(tried).items()}
        return known | {f.run.cell.label: f.outcome.seconds for f in finals}

    def _steps_ratio(self) -> float:
        """Steps of a final run over those of a trial that tunes."""
        if not is_shortened(self._config.fidelity):
            return 1.0
        base, info = self._prepared.base, self._prepared.info
        return full_steps(base, info) / search_steps(self._config.fidelity, base, info)


class _PhaseListener:
    """Counts the trainings of a phase as they end, those of other workers too.

    Args:
        console: prints.
        study: the phase's.
        planned: its trainings.
        before: trainings of the phases before it.
        total: of the whole benchmark.
        slots: how many run at once here.
    """

    def __init__(
        self,
        console: BenchmarkConsole,
        study: optuna.Study,
        planned: Sequence[PlannedRun],
        *,
        before: int,
        total: int,
        slots: int,
    ) -> None:
        self._console, self._study, self._planned = console, study, planned
        self._before, self._total, self._slots = before, total, slots
        self._still, self._seconds = 0.0, dict[str, float]()

    def expect(self, still: float, seconds: dict[str, float]) -> None:
        """Say how long the later phases, and trainings of each cell, take as far as is known."""
        self._still, self._seconds = still, seconds

    def update(self, running: Sequence[int]) -> None:
        self._console.update(running)

    def log(self, text: str) -> None:
        done = outcomes_of(self._study, self._planned, finished=True)
        took = [each.seconds for each in done.values()]
        mean = sum(took) / len(took) if took else 0.0
        left = [run for run in self._planned if run.number not in done]
        seconds = sum(self._seconds.get(run.cell.label, mean) for run in left)
        later = self._total - self._before - len(self._planned)
        still = self._still if self._still else later * mean
        self._console.stand(self._before + len(done), self._total, seconds + still, self._slots)
        self._console.ended(text)


def outcomes_of(
    study: optuna.Study, planned: Sequence[PlannedRun], *, finished: bool = False
) -> dict[int, TrialResult]:
    """What became of the trainings of a phase, by number.

    Args:
        study: the phase's.
        planned: its trainings.
        finished: whether those that have not ended are left out, rather than counted as failed.
    """
    found: dict[int, TrialResult] = {}
    for trial in latest_attempts(study):
        if trial.state.is_finished() and RUN in trial.params:
            outcome = trial.user_attrs.get(OUTCOME, {"failure": "its workers died"})
            took = 0.0 if trial.duration is None else trial.duration.total_seconds()
            result = TrialResult(**outcome)
            seconds = max(took, result.seconds)  # the start of a process takes its time, too
            found[int(trial.params[RUN])] = replace(result, seconds=seconds)
    numbers = [run.number for run in planned]
    if finished:
        return {number: found[number] for number in numbers if number in found}
    missing = TrialResult(failure="it was not trained")
    return {number: found.get(number, missing) for number in numbers}


def _why(outcome: TrialResult) -> str:
    if outcome.quality is not None:
        return ""
    return ": ".join(each for each in (outcome.failure, outcome.message) if each)
