"""Bad candidates stop at rungs, whatever the number of objectives; good ones never do."""

from __future__ import annotations

import numpy as np
import optuna
import pytest

from embcomp.search.config.search_sections import RungsConfig
from embcomp.search.evaluators.trial_pruning import falls_behind, front_of, make_pruner, rung_steps
from embcomp.search.reporting.importance import importances

pytestmark = pytest.mark.slow


def test_rungs_grow_by_the_reduction_and_end_below_the_last_step():
    assert rung_steps(RungsConfig(min_steps=10, reduction=3), 100) == [10, 30, 90]
    assert rung_steps(RungsConfig(min_steps=10, reduction=3), 90) == [10, 30]
    assert rung_steps(None, 90) == []


@pytest.mark.parametrize("kind", ["halving", "hyperband"])
def test_one_objective_stops_bad_candidates_and_keeps_the_best(kind):
    rungs = RungsConfig(min_steps=1, reduction=3, kind=kind)
    study = optuna.create_study(direction="maximize", pruner=make_pruner(rungs, 27, 1))
    quality = np.random.default_rng(0).permutation(60) / 60
    stopped, ended = [], []
    for value in quality:
        trial = study.ask()
        for step in rung_steps(rungs, 27):
            trial.report(value, step)
            if trial.should_prune():
                stopped.append(value)
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            ended.append(value)
            study.tell(trial, value)
    assert len(stopped) >= 20 and max(ended) == max(quality)
    assert np.mean(ended) > np.mean(stopped)


def test_several_objectives_keep_the_front_and_stop_most_of_the_rest():
    draw = np.random.default_rng(1)
    points = [tuple(point) for point in draw.random((60, 2))]
    fronts = front_of(points)
    seen: list[tuple[float, ...]] = []
    stopped = []
    for i, point in enumerate(points):
        if falls_behind(point, seen, 3):
            stopped.append(i)
        seen.append(point)
    assert all(fronts[i] > 0 for i in stopped)
    assert 25 <= len(stopped) <= 45


def test_few_candidates_are_never_stopped():
    assert not falls_behind((9.0, 9.0), [(1.0, 1.0)], 3)
    assert falls_behind((9.0, 9.0), [(1.0, 1.0), (2.0, 2.0)], 3)


def test_fronts_are_counted_from_the_best():
    assert front_of([(1, 1), (2, 2), (1, 3), (3, 1), (3, 3)]) == [0, 1, 1, 1, 2]
    assert front_of([(1, 1), (1, 1)]) == [0, 0]


def test_importance_is_the_share_of_variance_and_zero_by_chance():
    draw = np.random.default_rng(2)
    choices = [
        {"strong": int(a), "weak": int(b), "none": int(c)}
        for a, b, c in draw.integers(0, 4, (200, 3))
    ]
    scores = [3.0 * c["strong"] + c["weak"] + draw.normal() * 0.1 for c in choices]
    found = importances(choices, scores)
    assert list(found)[:2] == ["strong", "weak"]
    assert found["strong"] == pytest.approx(0.9, abs=0.05)
    assert found["weak"] == pytest.approx(0.1, abs=0.05)
    assert found["none"] < 0.03
    assert importances([], []) == {}
    assert importances([{"a": 1}, {"a": 1}], [0.1, 0.2]) == {"a": 0.0}
