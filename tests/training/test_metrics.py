"""Metrics against scikit-learn and against slow definitions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss as sklearn_log_loss, roc_auc_score

from embcomp.training.reporting.metrics import auc, compute_metrics, gauc, log_loss


def sample(rows: int, levels: int | None, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = (rng.random(rows) < 0.3).astype(np.float32)
    logits = rng.normal(size=rows) + labels
    if levels is not None:
        logits = np.round(logits * levels) / levels
    return logits.astype(np.float32), labels, rng.integers(0, rows // 20 + 1, rows)


@pytest.mark.parametrize("levels", [None, 1, 4], ids=["distinct", "many ties", "ties"])
def test_auc_equals_scikit_learn(levels):
    logits, labels, _ = sample(5000, levels)
    assert auc(logits, labels) == pytest.approx(roc_auc_score(labels, logits), abs=1e-13)


def test_auc_is_exact_when_all_scores_tie():
    assert auc(np.zeros(7), np.array([1, 0, 1, 0, 0, 0, 1])) == 0.5


def test_auc_of_large_float32_logits_keeps_their_order():
    # A float32 sigmoid would send all three to 1.0 and tie them.
    assert auc(np.array([30.0, 40.0, 50.0], dtype=np.float32), np.array([0, 1, 1])) == 1.0


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_metrics_of_one_class_are_nan_and_no_warning(label):
    metrics = compute_metrics(np.zeros(3), np.full(3, label), np.zeros(3, dtype=np.int64))
    assert np.isnan(metrics.auc) and np.isnan(metrics.gauc) and np.isnan(metrics.normalized_entropy)
    assert metrics.log_loss == pytest.approx(np.log(2))


def test_metrics_of_no_rows_are_nan_and_no_warning():
    metrics = compute_metrics(np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64))
    assert metrics.rows == 0 and np.isnan(metrics.auc) and np.isnan(metrics.log_loss)


def test_log_loss_equals_scikit_learn():
    logits, labels, _ = sample(3000, None)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert log_loss(logits, labels) == pytest.approx(
        sklearn_log_loss(labels, probabilities), abs=1e-13
    )


def test_log_loss_of_extreme_logits_is_finite_and_exact():
    assert log_loss(np.array([-1000.0, 1000.0]), np.array([1.0, 1.0])) == 500.0


@pytest.mark.parametrize("levels", [None, 2])
def test_gauc_is_the_row_weighted_mean_of_the_groups_auc(levels):
    logits, labels, groups = sample(2000, levels)
    total = weight = 0.0
    for group in np.unique(groups):
        mine = groups == group
        if 0 < labels[mine].sum() < mine.sum():
            total += mine.sum() * roc_auc_score(labels[mine], logits[mine])
            weight += mine.sum()
    assert weight > 0
    assert gauc(logits, labels, groups) == pytest.approx(total / weight, abs=1e-12)


def test_gauc_leaves_out_groups_of_one_class():
    groups = np.array([5, 5, 9, 9, 9])
    assert gauc(np.array([1.0, 2, 3, 4, 5]), np.array([0, 1, 1, 1, 1]), groups) == 1.0


def test_normalized_entropy_and_calibration_follow_their_definitions():
    logits, labels, _ = sample(4000, None)
    metrics = compute_metrics(logits, labels)
    rate = labels.mean(dtype=np.float64)
    entropy = sklearn_log_loss(labels, np.full(len(labels), rate))
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert metrics.normalized_entropy == pytest.approx(metrics.log_loss / entropy, abs=1e-12)
    assert metrics.calibration == pytest.approx(probabilities.mean() / rate, abs=1e-12)
    assert metrics.label_rate == pytest.approx(rate)
    constant = compute_metrics(np.full(len(labels), np.log(rate / (1 - rate))), labels)
    assert constant.normalized_entropy == pytest.approx(1.0, abs=1e-12)
    assert constant.calibration == pytest.approx(1.0, abs=1e-12)


def test_metrics_do_not_depend_on_the_order_of_rows_to_the_last_bit():
    logits, labels, groups = sample(3000, 8)
    shuffled = np.random.default_rng(1).permutation(len(labels))
    assert compute_metrics(logits, labels, groups) == compute_metrics(
        logits[shuffled], labels[shuffled], groups[shuffled]
    )
