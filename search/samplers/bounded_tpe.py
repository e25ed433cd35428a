"""TPE over a bounded number of trials, so that the thousandth candidate costs what the hundredth did.

Optuna's TPE fits its two densities to all trials anew for every candidate, so its cost grows with
trials times parameters. Here it gets the parameters of those trials that it will call good, and of
the others those of the latest and of an even share of the older ones: the density of what is not
good needs no thousand of them. Those that are left out are counted, by trials that have neither
parameters nor a score, so that as many are good as ever. Up to the bound nothing is left out. What
is left out is a function of the study alone, so that a search that was killed goes on as it would
have.

J. Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011; S. Watanabe,
"Tree-Structured Parzen Estimator", 2023, https://arxiv.org/abs/2304.11127 (how many are good, and
the weight of old ones, which stay Optuna's).
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from typing_extensions import override

MOST_SHOWN = 80
"""Finished trials that TPE sees, unless more of them are good."""
_LATEST = 25  # of the others, those that TPE gives full weight
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)
_GOOD = 25  # of one objective: the most that TPE calls good; of several, it calls a tenth so


class FewTrialsTPE(BaseSampler):
    """Optuna's TPE, all parameters together, over the trials that matter.

    Args:
        seed: of the sampler.
        startup: finished trials before anything is modelled.
        most: finished trials that it sees.
    """

    def __init__(self, seed: int, startup: int, most: int = MOST_SHOWN) -> None:
        self._most = max(most, startup)
        self._tpe = TPESampler(
            seed=seed, multivariate=True, constant_liar=True, n_startup_trials=startup
        )
        self._shown: optuna.Study | None = None

    @override
    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._tpe.infer_relative_search_space(study, trial)

    @override
    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = [one for one in study.get_trials(deepcopy=False) if one.number != trial.number]
        few = few_trials(trials, study.directions, self._most)
        self._shown = optuna.create_study(storage=_Shown(few), directions=study.directions)
        return self._tpe.sample_relative(self._shown, trial, search_space)

    @override
    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        seen = self._shown or study
        return self._tpe.sample_independent(seen, trial, param_name, param_distribution)


class _Shown(InMemoryStorage):
    """A study of trials that lie elsewhere; what is written to it is dropped."""

    def __init__(self, trials: list[FrozenTrial]) -> None:
        super().__init__()
        self._few = trials

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        return [trial for trial in self._few if states is None or trial.state in states]

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        pass


def few_trials(
    trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection], most: int
) -> list[FrozenTrial]:
    """The trials to show, and a blank one for each that is left out, as far as that matters.

    Args:
        trials: by number.
        directions: of the study.
        most: finished trials to show, unless more of them are good.
    """
    complete = [one for one in trials if one.state is TrialState.COMPLETE]
    pruned = [one for one in trials if one.state is TrialState.PRUNED]
    if len(complete) + len(pruned) <= most:
        return list(trials)
    signs = [1.0 if d == StudyDirection.MINIMIZE else -1.0 for d in directions]
    good = _GOOD if len(signs) == 1 else math.ceil((len(complete) + len(pruned)) / 10)
    kept = _ahead(complete, signs, good)
    if len(kept) < good:
        kept += sorted(pruned, key=lambda one: _furthest(one, signs[0]))[: good - len(kept)]
    numbers = {one.number for one in kept}
    rest = [one.number for one in trials if one.state in _DONE and one.number not in numbers]
    older, latest = rest[:-_LATEST], rest[-_LATEST:]
    numbers |= {*latest, *_evenly(older, most - len(kept) - len(latest))}
    shown = [one for one in trials if one.state not in _DONE or one.number in numbers]
    counted = len(complete) + len(pruned)
    if len(signs) == 1:  # beyond this many, no more are good
        counted = min(counted, 10 * _GOOD)
    # Without a score, these come behind all others.
    return shown + [create_trial(state=TrialState.PRUNED)] * max(0, counted - len(numbers))


def _ahead(trials: Sequence[FrozenTrial], signs: Sequence[float], good: int) -> list[FrozenTrial]:
    """The good trials of one objective; of several, whole fronts until there are enough."""
    if len(signs) == 1:
        return sorted(trials, key=lambda one: signs[0] * one.values[0])[:good]
    points = np.array([one.values for one in trials]) * np.array(signs)  # (trials, objectives)
    kept: list[FrozenTrial] = []
    left = np.arange(len(trials))
    while len(kept) < good and len(left):
        own = points[left]
        worse = (own[:, None] >= own[None]).all(axis=2) & (own[:, None] > own[None]).any(axis=2)
        is_front = ~worse.any(axis=1)
        kept += [trials[i] for i in left[is_front]]
        left = left[~is_front]
    return kept


def _furthest(trial: FrozenTrial, sign: float) -> tuple[float, float]:
    """TPE's order of stopped trials: those that came far first, then by their last score."""
    if not trial.intermediate_values:
        return 1.0, 0.0
    step, value = max(trial.intermediate_values.items())
    return -step, math.inf if math.isnan(value) else sign * value


def _evenly(numbers: list[int], count: int) -> list[int]:
    """Spread evenly over all of them, the first and the last included."""
    if count >= len(numbers):
        return numbers
    if count < 2:
        return numbers[: max(count, 0)]
    return [numbers[i * (len(numbers) - 1) // (count - 1)] for i in range(count)]
