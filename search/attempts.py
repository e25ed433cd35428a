"""Attempts at candidates, as a study's trials tell of them: what samplers and workers read alike."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from embcomp.search.liveness import is_alive, this_worker

Planned = TypeVar("Planned")

STALE = "lost"
"""On a trial whose worker died: the worker that took it off the books."""
RETRY_OF = "retry_of"
"""On a trial that repeats another: the number of the first attempt."""
SURPLUS = "surplus"
"""On a trial that should not have been started; it stands for no candidate."""
INTERRUPTED = "interrupted"
"""On a trial that its worker gave up in good order; the next attempt does not count as another."""
KIND = "kind"
"""On a trial: how its candidate was proposed."""
WORKER = "worker"
"""On a trial: who runs it."""
PROPOSER = "proposer"
"""On a trial: who draws its parameters, until it has begun."""

PLANNED = "planned"
"""On a trial that was enqueued at the start: the parameters that it is for."""

_LOOK_EVERY = 0.05  # seconds between two looks at what others propose
_PATIENCE = 20.0  # seconds that a proposal waits for those before it


def originals(study: optuna.Study) -> list[FrozenTrial]:
    """The first attempt at each candidate, by number."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if SURPLUS not in trial.user_attrs and RETRY_OF not in trial.user_attrs
    ]


def number_of(trial: Trial | FrozenTrial) -> int:
    """The number of a candidate: that of its first attempt."""
    return int(trial.user_attrs.get(RETRY_OF, trial.number))


def latest_attempts(study: optuna.Study) -> list[FrozenTrial]:
    """The last attempt at each candidate, in the order of the first ones."""
    latest: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        if SURPLUS not in trial.user_attrs:
            latest[trial.user_attrs.get(RETRY_OF, trial.number)] = trial
    return [latest[number] for number in sorted(latest)]


def sign_proposal(study: optuna.Study, trial: FrozenTrial) -> None:
    """Notes who proposes a trial, so that it is taken off the books at once when that worker dies."""
    study._storage.set_trial_user_attr(trial._trial_id, PROPOSER, this_worker())


def wait_for_earlier(study: optuna.Study, trial: FrozenTrial, parameters: Collection[str]) -> None:
    """Wait until all proposals before this one are known, so that workers do not repeat each other.

    Args:
        study: the study.
        trial: what is to be proposed.
        parameters: of the study; a trial that has them all is known.
    """
    deadline = time.monotonic() + _PATIENCE
    while any(
        one.number < trial.number
        and one.state is TrialState.RUNNING
        and not set(parameters) <= set(one.params)
        and _may_live(one)
        for one in originals(study)
    ):
        if time.monotonic() > deadline:
            return
        time.sleep(_LOOK_EVERY)


def _may_live(trial: FrozenTrial) -> bool:
    """Whether a trial's proposer may still work, as far as that is known without its signs of life."""
    proposer = trial.user_attrs.get(PROPOSER)
    return proposer is None or is_alive(proposer, {f"worker {proposer}": time.time()})


def next_of(planned: Sequence[Planned], tried: Iterable[Planned]) -> int | None:
    """The place of the first in a list that was not tried as often as it stands there so far.

    Not the number of those that were tried: one whose worker died while it was proposed leaves a gap.
    """
    left = Counter(tried)
    for place, one in enumerate(planned):
        if not left[one]:
            return place
        left[one] -= 1
    return None
