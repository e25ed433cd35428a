"""One worker: starts candidates, looks in on them, writes down what became of each."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from optuna.trial import Trial, TrialState

from embcomp.search.attempts import INTERRUPTED, number_of
from embcomp.search.evaluators.base import Rung, TrialHandle, TrialResult
from embcomp.search.trials.trial_queue import TrialQueue

LOOK_EVERY = 0.2  # seconds between two looks at running candidates

OUTCOME, RUNGS, STOPPED = "outcome", "rungs", "stopped_at"
"""User attributes of a trial: the outcome, scores at rungs, and the rung that it did not pass."""


class ProgressListener(Protocol):
    """Sees a search go on."""

    def update(self, running: Sequence[int]) -> None:
        """Now and then; the numbers of this worker's running candidates."""

    def log(self, text: str) -> None:
        """A line for people."""


@dataclass
class RunningTrial:
    """A candidate that runs here."""

    trial: Trial
    slot: int
    run: TrialHandle
    scores: dict[str, float]


class TrialRunner(ABC):
    """What a worker does with a study's trials."""

    def ready(self) -> bool:
        """Whether a new trial can be started without waiting for others."""
        return True

    @abstractmethod
    def start(self, trial: Trial, slot: int) -> TrialHandle | None:
        """Begin a trial's work; None gives it back, as nothing new is left to propose."""

    def why_ended(self) -> str:
        """Why nothing is left to propose, for people."""
        return "nothing is left to try"

    def is_behind(self, hand: RunningTrial, rung: Rung) -> bool:
        """Whether to stop a trial after a score on the way."""
        return False

    def values(self, trial: Trial, outcome: TrialResult) -> list[float]:
        """The study's values of an outcome with a score."""
        assert outcome.quality is not None
        return [outcome.quality]

    @abstractmethod
    def line(self, trial: Trial, outcome: TrialResult, what: str) -> str:
        """One line for people."""


class Worker:
    """Runs a study's trials until none is left.

    Args:
        queue: the study.
        jobs: what its trials stand for.
        listener: sees it go on.
        slots: how many run at once.
    """

    def __init__(
        self, queue: TrialQueue, jobs: TrialRunner, listener: ProgressListener, slots: int
    ) -> None:
        self._queue, self._jobs, self._listener, self._slots = queue, jobs, listener, slots
        self._hands: list[RunningTrial] = []
        self._ended = False
        self._any_ended = False

    def run(self) -> None:
        """Return when every trial of the study has ended, those of other workers included."""
        try:
            while self._turn():
                if not self._any_ended:
                    time.sleep(LOOK_EVERY)
        except BaseException:
            self._detach()
            raise

    def _turn(self) -> bool:
        queue = self._queue
        self._any_ended = False
        queue.heartbeat()
        for number in queue.retry_stale():
            self._listener.log(
                f"candidate {number}: its worker is gone; it goes on here or elsewhere"
            )
        while len(self._hands) < self._slots and self._has_next():
            if not self._start():
                break
        for hand in list(self._hands):
            self._look_at(hand)
        self._listener.update([number_of(hand.trial) for hand in self._hands])
        return bool(self._hands) or self._has_next() or queue.others_run()

    def _has_next(self) -> bool:
        """Whether a trial can be started: when nothing is left to propose, one to take over."""
        return self._queue.has_waiting() if self._ended else self._queue.has_next()

    def _start(self) -> bool:
        if not self._jobs.ready():
            return False
        trial = self._queue.next()
        if trial is None:
            return False
        used = {hand.slot for hand in self._hands}
        slot = next(i for i in range(self._slots) if i not in used)
        run = self._jobs.start(trial, slot)
        if run is None:
            self._queue.withdraw(trial)
            if not self._ended:
                self._listener.log(self._jobs.why_ended())
            self._ended = True
            return False
        self._hands.append(RunningTrial(trial, slot, run, {}))
        return True

    def _look_at(self, hand: RunningTrial) -> None:
        outcome = hand.run.poll()
        for rung in hand.run.rungs():
            hand.scores[str(rung.step)] = rung.quality
            hand.trial.set_user_attr(RUNGS, dict(hand.scores))
            if outcome is None and self._jobs.is_behind(hand, rung):
                hand.trial.set_user_attr(STOPPED, rung.step)
                self._end(hand, hand.run.stop(), TrialState.PRUNED)
                return
        if outcome is not None:
            state = TrialState.FAIL if outcome.quality is None else TrialState.COMPLETE
            self._end(hand, outcome, state)

    def _end(self, hand: RunningTrial, outcome: TrialResult, state: TrialState) -> None:
        hand.trial.set_user_attr(OUTCOME, recorded(outcome))
        values = self._jobs.values(hand.trial, outcome) if state is TrialState.COMPLETE else None
        self._queue.study.tell(hand.trial, values, state=state)
        self._hands.remove(hand)
        self._any_ended = True
        what = {TrialState.PRUNED: "stopped early", TrialState.FAIL: outcome.failure or "failed"}
        self._listener.log(self._jobs.line(hand.trial, outcome, what.get(state, "")))

    def _detach(self) -> None:
        """End what runs here; the trials stay open, for whoever comes next."""
        for hand in self._hands:
            hand.run.detach()
        for hand in self._hands:
            hand.trial.set_user_attr(INTERRUPTED, True)


def recorded(outcome: TrialResult) -> dict[str, Any]:
    """An outcome as JSON values."""
    return {key: value for key, value in vars(outcome).items() if value not in (None, "", {})}
