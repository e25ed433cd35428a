"""A search from its first candidate to its result: propose, select, retrain, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.pruners import NopPruner
from optuna.storages import BaseStorage

from embcomp.config.train_config import is_loss
from embcomp.search.config.search_sections import LEAST_RANKED
from embcomp.search.evaluators.base import Evaluator
from embcomp.search.evaluators.training_evaluator import Slot, TrainingEvaluator
from embcomp.search.evaluators.trial_pruning import make_pruner
from embcomp.search.prepared import Prepared, directions_of, identity_of
from embcomp.search.reporting.correlation import choose_spread, correlate
from embcomp.search.reporting.results import SearchResult, gather
from embcomp.search.samplers.derived_cma import has_pickled_state
from embcomp.search.samplers.optuna_sampler import RepairedSampler, make_encoding, make_source
from embcomp.search.trials.candidate_jobs import CandidateJobs
from embcomp.search.trials.retraining import (
    RetrainingJobs,
    SelectedCandidate,
    finals_name,
    select_candidates,
    write_recipes,
)
from embcomp.search.trials.storage import open_study
from embcomp.search.trials.trial_progress import SearchConsole
from embcomp.search.trials.trial_queue import SigningSampler, TrialQueue
from embcomp.search.trials.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Selected:
    """What is trained in full.

    Args:
        points: the best candidates, as recipes.
        spread: candidates from all over the scores, to rank them.
    """

    points: list[SelectedCandidate]
    spread: list[SelectedCandidate]


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """The studies of what was trained in full; None where there was nothing.

    Args:
        finals: of the points.
        ranked: of the spread.
    """

    finals: optuna.Study | None
    ranked: optuna.Study | None


class SearchRun:
    """One worker's part in a search; every step goes on with what the studies hold already.

    Args:
        prepared: the search.
        home: its folder.
        storage: where its studies lie.
        console: sees it go on.
        slots: what trainings may use.
        evaluator: scores candidates.
    """

    def __init__(
        self,
        prepared: Prepared,
        home: Path,
        storage: BaseStorage,
        console: SearchConsole,
        slots: Sequence[Slot],
        evaluator: Evaluator,
    ) -> None:
        self._prepared, self._config = prepared, prepared.config
        self._home, self._storage = home, storage
        self._console, self._slots, self._evaluator = console, slots, evaluator
        config, repair = prepared.config, prepared.repair
        encoding = make_encoding(config, repair)
        self._sampler = RepairedSampler(
            make_source(config, repair, encoding),
            encoding,
            repair,
            fill=config.fills,
            quality_sign=-1 if is_loss(config.quality) else 1,
            seed=config.seed,
        )

    def propose(self) -> optuna.Study:
        """Score candidates until there are as many as wanted, or none are left."""
        config, evaluator, sampler = self._config, self._evaluator, self._sampler
        study = open_study(
            self._storage,
            config.name,
            directions_of(config),
            sampler,
            make_pruner(config.fidelity.rungs, evaluator.steps, len(config.objectives)),
            identity_of(self._prepared, evaluator.steps),
        )
        self._say_what_is_known(study)
        count = config.trials.count if sampler.source.count is None else sampler.source.count
        queue = TrialQueue(
            study,
            self._storage,
            sampler.encoding.distributions,
            count=count,
            retries=config.trials.retries,
        )
        title = f"{config.name}: {evaluator.fidelity}"
        self._console.follow(study, title, count, evaluator.slots)
        try:
            evaluator.prepare()
            jobs = CandidateJobs(config, queue, sampler, self._prepared.repair, evaluator)
            Worker(queue, jobs, self._console, evaluator.slots).run()
        finally:
            evaluator.close()
        return study

    def _say_what_is_known(self, study: optuna.Study) -> None:
        for note in self._prepared.space.notes:
            self._console.log(note)
        if has_pickled_state(study):
            self._console.log(
                "an earlier version left pickled states of CMA-ES in this study; they are not read, "
                "and its state is worked out from the trials"
            )

    def select(self, study: optuna.Study) -> Selected:
        """Choose what to train in full, by validation scores alone, and write recipes of it."""
        config = self._config
        points = select_candidates(config, study, self._sampler)
        write_recipes(self._prepared.space, points, self._home / "points")
        spread = choose_spread(config, study, self._sampler)
        return Selected(points=points, spread=spread)

    def retrain(self, selected: Selected) -> Retrained:
        """Train what was selected in full."""
        finals = self._in_full("finals", "chosen points in full", selected.points)
        if self._config.finals.correlation and not selected.spread:
            self._console.log(f"fewer than {LEAST_RANKED} candidates were scored: too few to rank")
        ranked = self._in_full("correlation", "candidates in full, to rank them", selected.spread)
        return Retrained(finals=finals, ranked=ranked)

    def report(self, study: optuna.Study, selected: Selected, retrained: Retrained) -> SearchResult:
        """Put the result together."""
        points, correlation = selected.points, None
        if retrained.ranked is not None:
            correlation = correlate(
                retrained.ranked,
                selected.spread,
                among_finals={(point.number, seed) for point in points for seed in point.seeds},
                full_steps=self._evaluator.full_steps,
            )
        return gather(
            self._config,
            self._prepared.repair,
            self._sampler,
            study,
            points,
            retrained.finals,
            self._evaluator,
            correlation,
        )

    def _in_full(
        self, what: str, title: str, points: Sequence[SelectedCandidate]
    ) -> optuna.Study | None:
        """Train points, or what is left of them, as a study of their own; None without points.

        Args:
            what: part of the study's name.
            title: for people.
            points: what to train.
        """
        if not points:
            return None
        config, space = self._config, self._prepared.space
        evaluator = TrainingEvaluator(config, space, self._home, self._slots, in_full=True)
        jobs = RetrainingJobs(config.quality, points, evaluator)
        name, direction = finals_name(config, points, what), directions_of(config)[:1]
        known = {"search": config.name}
        study = open_study(self._storage, name, direction, SigningSampler(), NopPruner(), known)
        queue = TrialQueue(
            study,
            self._storage,
            jobs.distributions,
            count=len(jobs.planned),
            retries=config.trials.retries,
            planned=jobs.planned,
        )
        self._console.follow(study, f"{config.name}: {title}", queue.count, evaluator.slots)
        try:
            evaluator.prepare()
            Worker(queue, jobs, self._console, evaluator.slots).run()
        finally:
            evaluator.close()
        return study


def make_evaluator(prepared: Prepared, home: Path, slots: Sequence[Slot]) -> Evaluator:
    """What scores a search's candidates.

    Args:
        prepared: the search.
        home: its folder.
        slots: what trainings may use.
    """
    config = prepared.config
    if config.evaluator.name == "training":
        return TrainingEvaluator(config, prepared.space, home, slots)
    from embcomp.search.evaluators.supernet_evaluator import SupernetEvaluator

    return SupernetEvaluator(config, prepared.space, home, slots, prepared.budget)
