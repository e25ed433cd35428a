"""Attempts at candidates, as a study's trials tell of them: what samplers and workers read alike."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial

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


def originals(study: optuna.Study) -> list[FrozenTrial]:
    """The first attempt at each candidate, by number."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if SURPLUS not in trial.user_attrs and RETRY_OF not in trial.user_attrs
    ]


def latest_attempts(study: optuna.Study) -> list[FrozenTrial]:
    """The last attempt at each candidate, in the order of the first ones."""
    latest: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        if SURPLUS not in trial.user_attrs:
            latest[trial.user_attrs.get(RETRY_OF, trial.number)] = trial
    return [latest[number] for number in sorted(latest)]
