"""TPE over few trials: the good ones are never left out, and nothing is lost by it."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from embcomp.search.samplers.bounded_tpe import FewTrialsTPE, few_trials

SPACE: dict[str, BaseDistribution] = {f"x{i}": IntDistribution(0, 9) for i in range(6)} | {
    "kind": CategoricalDistribution(["a", "b"])
}
TARGET = [0, 7, 4, 1, 8, 5]
WORTH = [1.0, 0.1, 4.0, 0.3, 3.0, 2.0]


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def score(parameters) -> float:
    """Planted: each number has a target and a worth, and neighbours count together."""
    off = [abs(parameters[f"x{i}"] - TARGET[i]) for i in range(6)]
    alone = sum(w * d / 3 for w, d in zip(WORTH, off))
    together = sum(a * b for a, b in pairwise(off)) * 0.06
    return -alone - together - 2 * (parameters["kind"] == "a")


class Fresh(BaseSampler):
    """As the search has it: a sampler of its own for each trial."""

    def __init__(self, make, seed) -> None:
        self._make, self._seed = make, seed

    def infer_relative_search_space(self, study, trial):
        return SPACE

    def sample_relative(self, study, trial, search_space):
        sampler = self._make(self._seed * 1000 + trial.number)
        found = dict(sampler.sample_relative(study, trial, dict(SPACE)))
        for name, distribution in SPACE.items():
            if name not in found:
                found[name] = sampler.sample_independent(study, trial, name, distribution)
        return found

    def sample_independent(self, study, trial, param_name, param_distribution):
        raise RuntimeError(param_name)


def best_of(make, seed, count) -> float:
    study = optuna.create_study(direction="maximize", sampler=Fresh(make, seed))
    for _ in range(count):
        trial = study.ask(fixed_distributions=SPACE)
        study.tell(trial, score(trial.params))
    return study.best_value


def whole(seed):
    return TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=10)


def few(seed):
    return FewTrialsTPE(seed, 10, most=40)


def random(seed):
    return RandomSampler(seed=seed)


def test_few_trials_find_what_all_trials_find():
    best = {make: mean(best_of(make, seed, 100) for seed in range(2)) for make in MAKERS}
    gained = best[whole] - best[random]
    assert gained > 1
    assert best[few] > best[random] + 0.75 * gained


MAKERS = (whole, few, random)


def test_up_to_the_bound_it_is_optunas_own():
    assert best_of(few, 1, 40) == best_of(whole, 1, 40) > best_of(random, 1, 40)


def make_trials(count, objectives, seed=0):
    draw = np.random.default_rng(seed)
    trials = []
    for number in range(count):
        state = TrialState.PRUNED if number % 7 == 3 else TrialState.COMPLETE
        parameters = {f"x{i}": int(draw.integers(10)) for i in range(6)} | {"kind": "a"}
        values = [float(draw.random()) for _ in range(objectives)]
        trial = create_trial(
            params=parameters,
            distributions=SPACE,
            values=values if state is TrialState.COMPLETE else None,
            state=state,
            intermediate_values={2: values[0]} if objectives == 1 else {},
        )
        trial.number = number
        trials.append(trial)
    return trials


def test_the_good_the_latest_and_some_old_trials_are_shown_and_the_others_counted():
    trials = make_trials(400, 1)
    shown = few_trials(trials, [StudyDirection.MAXIMIZE], 100)
    kept = [one.number for one in shown if one.params]
    assert len(kept) == 100 and len(shown) == 250  # of which TPE calls 25 good, as of any more
    complete = [one for one in trials if one.state is TrialState.COMPLETE]
    good = sorted(complete, key=lambda one: -one.values[0])[:25]
    assert {one.number for one in good} <= set(kept)
    assert set(range(380, 400)) <= set(kept)
    assert len([number for number in kept if number < 200]) > 25
    assert few_trials(trials[:100], [StudyDirection.MAXIMIZE], 100) == trials[:100]
    fewer = few_trials(trials[:180], [StudyDirection.MAXIMIZE], 100)
    assert len(fewer) == 180 and sum(bool(one.params) for one in fewer) == 100


def test_of_several_objectives_whole_fronts_are_kept():
    trials = make_trials(300, 2)
    directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    kept = {one.number for one in few_trials(trials, directions, 100) if one.params}
    complete = [one for one in trials if one.state is TrialState.COMPLETE]
    front = [
        one.number
        for one in complete
        if not any(
            other.values[0] >= one.values[0]
            and other.values[1] <= one.values[1]
            and other.values != one.values
            for other in complete
        )
    ]
    assert front and set(front) <= kept and len(kept) <= 100
    study = optuna.create_study(directions=directions)
    study.add_trials(trials)
    asked = study.ask()
    sampler = FewTrialsTPE(0, 10, most=100)
    found = sampler.sample_relative(study, study.trials[asked.number], dict(SPACE))
    assert set(found) == set(SPACE)


def test_few_complete_trials_are_made_up_for_by_the_best_stopped_ones():
    trials = make_trials(140, 1)
    for trial in trials[5:]:
        trial.state = TrialState.PRUNED
    shown = few_trials(trials, [StudyDirection.MAXIMIZE], 60)
    stopped = sorted(trials[5:], key=lambda one: -one.intermediate_values[2])[:20]
    assert {one.number for one in [*trials[:3], *stopped]} <= {
        one.number for one in shown if one.params
    }
