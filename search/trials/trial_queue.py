"""The study as a queue of trials, one for each candidate: nothing finished is lost or done twice, whoever dies.

A candidate is an Optuna trial with the worker's name on it. A worker that is gone leaves trials
that run for ever; the next one to look takes each off the books (only one can) and enqueues it
again, to go on from the checkpoint that it left. Workers on this machine are gone when their process
is; others when they have not been heard of for a while.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from typing_extensions import override

from embcomp.search.attempts import (
    INTERRUPTED,
    KIND,
    PLANNED,
    PROPOSER,
    RETRY_OF,
    STALE,
    SURPLUS,
    WORKER,
    originals,
    sign_proposal,
)
from embcomp.search.liveness import is_alive, this_worker

_HEARTBEAT_SECONDS = 30.0  # seconds between two
_NAMELESS = 60.0  # seconds that a trial may run before its worker signs it


class SigningSampler(RandomSampler):
    """For planned studies: says who begins a trial; what it draws is never trained."""

    @override
    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        sign_proposal(study, trial)


class TrialQueue:
    """One worker's view of a study.

    Args:
        study: the study, opened by this worker.
        storage: where it lies.
        distributions: the study's parameters.
        count: candidates to try; None when the source knows.
        retries: how often a candidate is tried again whose worker died.
        planned: parameters of all candidates, none of them twice, where these are known at the start;
            None leaves it to the study's sampler to propose them.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: BaseStorage,
        distributions: Mapping[str, optuna.distributions.BaseDistribution],
        *,
        count: int,
        retries: int,
        planned: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.study, self._storage = study, storage
        self._distributions = dict(distributions)
        self.count, self._retries = count, retries
        self._planned = None if planned is None else [dict(each) for each in planned]
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self.worker = this_worker()
        self._last_heartbeat = 0.0
        self.heartbeat()

    def heartbeat(self) -> None:
        """Show that this worker is alive, now and then."""
        now = time.time()
        if now - self._last_heartbeat >= _HEARTBEAT_SECONDS:
            self._storage.set_study_user_attr(self._study_id, f"worker {self.worker}", now)
            self._last_heartbeat = now

    def has_next(self) -> bool:
        """Whether a candidate is left to start."""
        if self._planned is None:
            return self.has_waiting() or len(originals(self.study)) < self.count
        self._enqueue_planned(self._planned)
        return self.has_waiting()

    def _enqueue_planned(self, planned: list[dict[str, Any]]) -> None:
        """Enqueue what no trial is for: at first everything, later what its worker died to begin.

        Workers that do so at the same moment enqueue a candidate twice; the first trial stands.
        """
        there = [_plan_of(trial) for trial in originals(self.study)]
        for params in planned:
            if params not in there:
                self.study.enqueue_trial(params, user_attrs={PLANNED: params})

    def has_waiting(self) -> bool:
        """Whether a candidate that was enqueued waits to be started."""
        return self._has((TrialState.WAITING,))

    def _has(self, states: Sequence[TrialState]) -> bool:
        trials = self.study.get_trials(deepcopy=False)
        return any(trial.state in states and self._is_planned(trial) for trial in trials)

    def _is_planned(self, trial: FrozenTrial) -> bool:
        """Whether a trial is for something in the plan; one that an earlier plan left is not."""
        return self._planned is None or _wanted_of(trial) in self._planned

    def next(self) -> Trial | None:
        """Start the next candidate; None when others were quicker."""
        trial = self.study.ask(fixed_distributions=self._distributions)
        if self._planned is not None and trial.params not in self._planned:
            self.withdraw(trial)
            return None
        if RETRY_OF not in trial.user_attrs and self._is_surplus(trial):
            self.withdraw(trial)
            return None
        trial.set_user_attr(WORKER, self.worker)
        return trial

    def _is_surplus(self, trial: Trial) -> bool:
        """Whether others were quicker to start the last candidate, or to enqueue this one."""
        earlier = [one for one in originals(self.study) if one.number < trial.number]
        if self._planned is None:
            return len(earlier) >= self.count
        plan = trial.user_attrs.get(PLANNED)  # None where nothing waited any more
        return plan is None or plan in [_plan_of(one) for one in earlier]

    def withdraw(self, trial: Trial) -> None:
        """Take a trial that was started in vain off the books."""
        trial.set_user_attr(SURPLUS, True)
        self.study.tell(trial, state=TrialState.FAIL)

    def others_run(self) -> bool:
        """Whether other workers still have candidates in hand."""
        return self._has((TrialState.RUNNING, TrialState.WAITING))

    def retry_stale(self) -> list[int]:
        """Enqueue what dead workers left; returns the numbers of first attempts."""
        trials = self.study.get_trials(deepcopy=False)
        signs = self.study.user_attrs
        again = []
        for trial in trials:
            if trial.state is TrialState.RUNNING and self._is_lost(trial, signs):
                if self.claim_stale(trial) and self._enqueue(trial, trials):
                    again.append(trial.user_attrs.get(RETRY_OF, trial.number))
            elif self._half_retried(trial, trials, signs) and self._enqueue(trial, trials):
                again.append(trial.user_attrs.get(RETRY_OF, trial.number))
        return again

    def _is_lost(self, trial: FrozenTrial, signs: Mapping[str, Any]) -> bool:
        if INTERRUPTED in trial.user_attrs:  # given up in good order, perhaps by this very process
            return True
        worker = trial.user_attrs.get(WORKER, trial.user_attrs.get(PROPOSER))
        if worker is None:
            begun = trial.datetime_start
            old = begun is None or time.time() - begun.timestamp() > _NAMELESS
            return old or not self._others_live(signs)
        return worker != self.worker and not is_alive(worker, signs)

    def _others_live(self, signs: Mapping[str, Any]) -> bool:
        """Whether any other worker lives; each signs the study before it asks for a candidate."""
        names = [key.removeprefix("worker ") for key in signs if key.startswith("worker ")]
        return any(name != self.worker and is_alive(name, signs) for name in names)

    def _half_retried(
        self, trial: FrozenTrial, trials: list[FrozenTrial], signs: Mapping[str, Any]
    ) -> bool:
        """Whether a worker died between taking a trial off the books and enqueueing it."""
        taker = trial.user_attrs.get(STALE)
        if taker is None or trial.state is not TrialState.FAIL or self._attempts(trial, trials)[1]:
            return False
        return taker != self.worker and not is_alive(taker, signs)

    def claim_stale(self, trial: FrozenTrial) -> bool:
        """End a lost trial; False if another worker was quicker."""
        number = trial.number
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        try:
            self._storage.set_trial_user_attr(trial_id, STALE, self.worker)
            if self._was_proposed_in_vain(trial):
                self._storage.set_trial_user_attr(trial_id, SURPLUS, True)
            self.study.tell(number, state=TrialState.FAIL)
        except (ValueError, RuntimeError):  # it has ended meanwhile
            return False
        return True

    def _was_proposed_in_vain(self, trial: FrozenTrial) -> bool:
        """Whether its worker died before it began: there is nothing to repeat, only to propose."""
        begun = WORKER in trial.user_attrs or RETRY_OF in trial.user_attrs
        return not begun or not set(self._distributions) <= set(trial.params)

    def _enqueue(self, trial: FrozenTrial, trials: list[FrozenTrial]) -> bool:
        if self._was_proposed_in_vain(trial):
            return False
        first, later = self._attempts(trial, trials)
        died = INTERRUPTED not in trial.user_attrs
        attempt = trial.user_attrs.get("attempt", 0) + died
        if later or attempt > self._retries:
            return False
        known = {RETRY_OF: first, "attempt": attempt, KIND: trial.user_attrs.get(KIND, "")}
        self.study.enqueue_trial(dict(trial.params), user_attrs=known)
        return True

    def _attempts(
        self, trial: FrozenTrial, trials: list[FrozenTrial]
    ) -> tuple[int, list[FrozenTrial]]:
        """The number of the first attempt, and the attempts after this one."""
        first = trial.user_attrs.get(RETRY_OF, trial.number)
        later = [
            other
            for other in trials
            if other.user_attrs.get(RETRY_OF) == first and other.number > trial.number
        ]
        return first, later


def _wanted_of(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial was enqueued with, else what it has drawn."""
    return dict(trial.system_attrs.get("fixed_params", trial.params))


def _plan_of(trial: FrozenTrial) -> dict[str, Any] | None:
    """What a trial of a planned study is for; None for one that stands for nothing.

    Before trials were enqueued, a sampler proposed them, and they were theirs once a worker signed.
    """
    if PLANNED in trial.user_attrs:
        return dict(trial.user_attrs[PLANNED])
    return dict(trial.params) if WORKER in trial.user_attrs else None
