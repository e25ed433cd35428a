"""Weighted metrics: a weight of k is k such rows, a weight of 0 is none, and factors go out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import log_loss as sklearn_log_loss, roc_auc_score

from embcomp.training.reporting.metrics import Metrics, auc, compute_metrics
from tests.training.test_metrics import sample


def drawn(weights, rows: int = 2000, levels: int | None = 4):
    """Logits, labels, groups and weights; by default with many ties."""
    logits, labels, groups = sample(rows, levels)
    chosen = np.random.default_rng(7).choice(np.float32(weights), size=rows)
    return logits, labels, groups, chosen


def close(found: Metrics, expected: Metrics, rel: float) -> bool:
    pairs = zip(dataclasses.astuple(found), dataclasses.astuple(expected))
    return all(a == pytest.approx(b, rel=rel, nan_ok=True) for a, b in pairs)


@pytest.mark.parametrize("levels", [None, 1, 4], ids=["distinct", "many ties", "ties"])
def test_a_whole_weight_is_that_many_equal_rows(levels):
    logits, labels, groups, weights = drawn([0, 1, 2, 7], levels=levels)
    found = compute_metrics(logits, labels, groups, weights)
    times = weights.astype(int)
    repeated = [np.repeat(column, times) for column in (logits, labels, groups)]
    expected = compute_metrics(*repeated)
    # Pairs are counted in integers: these are equal to the bit.
    assert (found.auc, found.label_rate) == (expected.auc, expected.label_rate)
    assert found.gauc == pytest.approx(expected.gauc, rel=1e-14)
    assert found.rows == (times > 0).sum()
    assert close(dataclasses.replace(found, rows=expected.rows), expected, rel=1e-12)


def test_weights_of_one_are_no_weights_to_the_bit():
    logits, labels, groups, weights = drawn([1])
    plain = compute_metrics(logits, labels, groups)
    assert compute_metrics(logits, labels, groups, weights) == plain


@pytest.mark.parametrize("weights", [[0, 1], [0, 0.3, 2.5]])
def test_a_weight_of_zero_leaves_the_row_out_to_the_bit(weights):
    logits, labels, groups, weights = drawn(weights)
    kept = weights > 0
    left = [column[kept] for column in (logits, labels, groups, weights)]
    assert compute_metrics(logits, labels, groups, weights) == compute_metrics(*left)


@pytest.mark.parametrize("weights", [[1, 2, 5], [0.1, 0.35, 2], [0, 1e-3, 1e3]])
@pytest.mark.parametrize(("factor", "rel"), [(2.0**-9, 1e-14), (0.1, 1e-6), (1e6, 1e-6)])
def test_a_common_factor_changes_nothing(weights, factor, rel):
    # Factors that are no powers of two round each weight anew.
    logits, labels, groups, weights = drawn(weights)
    found = compute_metrics(logits, labels, groups, weights * np.float32(factor))
    assert close(found, compute_metrics(logits, labels, groups, weights), rel)


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("weights", [[1, 3], [0.05, 0.4, 12.5]])
def test_weighted_auc_and_log_loss_equal_scikit_learn(levels, weights):
    logits, labels, _, weights = drawn(weights, levels=levels)
    found = compute_metrics(logits, labels, weights=weights)
    exact = weights.astype(np.float64)
    assert found.auc == pytest.approx(roc_auc_score(labels, logits, sample_weight=exact), abs=1e-12)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = sklearn_log_loss(labels, probabilities, sample_weight=exact)
    assert found.log_loss == pytest.approx(expected, abs=1e-12)
    rate = np.average(labels, weights=exact)
    assert found.label_rate == pytest.approx(rate)
    expected = np.average(probabilities, weights=exact) / rate
    assert found.calibration == pytest.approx(expected)
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    assert found.normalized_entropy == pytest.approx(found.log_loss / entropy)


def test_weighted_gauc_weighs_groups_by_their_weights():
    groups = np.array([1, 1, 2, 2, 2])
    scores, labels = np.array([1.0, 2, 1, 2, 3]), np.array([1.0, 0, 0, 1, 1])
    weights = np.array([0.5, 0.5, 1.5, 0.25, 0.25])
    found = compute_metrics(scores, labels, groups, weights)
    assert found.gauc == pytest.approx((0 * 1.0 + 1 * 2.0) / 3.0)


def test_fractions_do_not_round_to_an_auc_above_one():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 5000)
    weights = rng.random(10_000).astype(np.float32)
    assert auc(labels + rng.random(10_000) / 2, labels, weights.astype(np.float64)) <= 1.0


@pytest.mark.parametrize("weights", [[0.2, 1.7, 3], [1, 2]])
def test_weighted_metrics_do_not_depend_on_the_order_of_rows_to_the_last_bit(weights):
    columns = drawn(weights)
    shuffled = np.random.default_rng(1).permutation(len(columns[0]))
    assert compute_metrics(*columns) == compute_metrics(*(each[shuffled] for each in columns))


def test_without_any_weight_metrics_are_nan_and_no_warning():
    found = compute_metrics(np.zeros(3), np.ones(3), np.zeros(3, int), np.zeros(3))
    assert found.rows == 0 and np.isnan(dataclasses.astuple(found)[:-1]).all()
