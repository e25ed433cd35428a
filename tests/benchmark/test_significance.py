"""Standard errors and paired bootstraps against what theory and another library say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from sklearn.metrics import roc_auc_score

from embcomp.benchmark.significance import (
    RankedRows,
    RowBootstrap,
    auc_standard_error,
    paired_difference,
    swallowed,
)


def planted(rows: int, gain: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores that know more of them the larger the gain."""
    generator = np.random.default_rng(seed)
    labels = (generator.random(rows) < 0.3).astype(np.float32)
    return labels, (gain * labels + generator.normal(size=rows)).astype(np.float32)


def test_without_rows_of_both_kinds_there_is_no_standard_error():
    assert math.isnan(auc_standard_error(0.7, 0, 10))
    assert math.isnan(auc_standard_error(math.nan, 5, 10))


def test_few_positives_have_the_standard_error_that_many_draws_have():
    draws = []
    for seed in range(120):
        generator = np.random.default_rng(seed)
        labels = np.zeros(8000, dtype=np.float32)
        labels[:260] = 1
        draws.append(roc_auc_score(labels, labels * 0.8 + generator.normal(size=8000)))
    expected = auc_standard_error(float(np.mean(draws)), 260, 7740)
    assert expected == pytest.approx(np.std(draws), rel=0.2)


@settings(max_examples=60, deadline=None)
@given(
    strategies.lists(
        strategies.tuples(
            strategies.integers(-3, 3), strategies.booleans(), strategies.integers(0, 3)
        ),
        min_size=2,
        max_size=40,
    )
)
def test_drawn_aucs_are_those_of_repeated_rows(rows):
    """Ties and rows that were never drawn included."""
    scores, labels, counts = (np.array(column) for column in zip(*rows))
    repeated = np.repeat(np.arange(len(rows)), counts)
    found = RankedRows.of(scores.astype(np.float32), labels.astype(np.float32)).aucs(counts[None])
    if len(set(labels[repeated])) == 2:
        assert found[0] == pytest.approx(roc_auc_score(labels[repeated], scores[repeated]))
    else:
        assert np.isnan(found[0])


def draws_of(labels, scores, resamples=400):
    return RowBootstrap(labels, resamples=resamples, seed=1).aucs(
        list(scores), lambda name: scores[name]
    )


def test_the_spread_of_draws_is_the_standard_error():
    labels, scores = planted(5000, 1.0, 0)
    found = draws_of(labels, {"a": scores})["a"]
    auc = roc_auc_score(labels, scores)
    positives = int(labels.sum())
    expected = auc_standard_error(auc, positives, len(labels) - positives)
    assert found.std() == pytest.approx(expected, rel=0.15)
    assert found.mean() == pytest.approx(auc, abs=0.002)


def test_draws_do_not_depend_on_how_many_runs_are_drawn_together(monkeypatch):
    from embcomp.benchmark import significance

    labels, scores = planted(300, 1.0, 0)
    runs = {"a": scores, "b": -scores, "c": scores**2}
    whole = draws_of(labels, runs, 50)
    monkeypatch.setattr(significance, "_RANKED_AT_ONCE", 1)
    monkeypatch.setattr(significance, "_DRAWN_AT_ONCE", 8 * 300 * 7)
    apart = draws_of(labels, runs, 50)
    assert all(np.array_equal(whole[name], apart[name]) for name in runs)
    assert np.allclose(whole["a"] + whole["b"], 1)


def compare(gain: float, *, rows: int = 4000, seeds: int = 3, noise: float = 0.3):
    """A method with a planted gain against one without, on rows that are hard for both alike."""
    generator = np.random.default_rng(5)
    labels, common = planted(rows, 1.0, 7)
    scores = {}
    for seed in range(seeds):
        for name, own in (("ours", gain), ("theirs", 0.0)):
            drawn = noise * generator.normal(size=rows)
            scores[f"{name} {seed}"] = (common + own * labels + drawn).astype(np.float32)
    draws = draws_of(labels, scores)
    aucs = {name: roc_auc_score(labels, each) for name, each in scores.items()}

    def of(found, name):
        return {seed: found[f"{name} {seed}"] for seed in range(seeds)}

    return paired_difference(
        of(aucs, "ours"), of(aucs, "theirs"), of(draws, "ours"), of(draws, "theirs"), seed=3
    )


def test_a_planted_gain_is_found_though_one_auc_is_less_certain_than_it():
    found = compare(0.05)
    assert found.is_better and found.low > 0 and found.seeds == 3
    assert found.difference < auc_standard_error(0.78, 1200, 2800) * 1.5


def test_no_gain_is_not_found_and_a_loss_least_of_all():
    assert not compare(0.0).is_better
    loss = compare(-0.2)
    assert not loss.is_better and loss.p > 0.95


def test_chance_is_called_a_gain_as_often_as_said():
    """Of two methods without a difference, one is better at 5 % in about 5 % of the cases."""
    called = 0
    for case in range(120):
        generator = np.random.default_rng(case)
        labels, common = planted(400, 1.0, case)
        scores = {
            name: (common + 0.5 * generator.normal(size=400)).astype(np.float32) for name in "ab"
        }
        draws = draws_of(labels, scores, 100)
        found = paired_difference({0: 0.0}, {0: 0.0}, {0: draws["a"]}, {0: draws["b"]}, seed=case)
        called += found.is_better
    assert 1 <= called <= 14


def test_seeds_that_only_one_has_are_left_out():
    ours = {1: np.full(50, 0.7), 2: np.full(50, 0.1)}
    theirs = {1: np.full(50, 0.6), 3: np.full(50, 0.9)}
    found = paired_difference({1: 0.7, 2: 0.1}, {1: 0.6, 3: 0.9}, ours, theirs, seed=0)
    assert found.seeds == 1 and found.difference == pytest.approx(0.1)
    assert paired_difference({2: 0.1}, {3: 0.9}, {2: ours[2]}, {3: theirs[3]}, seed=0) is None


def test_a_standard_error_swallows_smaller_differences_alone():
    assert swallowed([0.70, 0.71, math.nan], 0.019)
    assert not swallowed([0.70, 0.75], 0.019)
    assert not swallowed([0.70], 0.019)
