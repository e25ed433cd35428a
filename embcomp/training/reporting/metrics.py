"""Exact metrics of a set of predictions: nothing is binned or sampled.

AUC counts pairs in integers, and sums run over predictions in sorted order, so that results do not
depend on how rows were spread over ranks. With weights a row counts as that many: those that are
whole numbers are counted in integers too, so that AUC is that of a split with such rows repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32] | NDArray[np.float64]
Labels = Floats | NDArray[np.bool_]
Integers = NDArray[np.integer]
Masses = NDArray[np.int64] | NDArray[np.float64]

_COUNTED = 2**31  # weights up to this sum have pairs that 64 bits hold


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of one split; NaN where undefined (AUC of one class, GAUC without groups).

    Attributes:
        auc: share of (positive, negative) pairs in the right order; ties count half.
        log_loss: mean binary cross-entropy, natural logarithm.
        normalized_entropy: `log_loss` over the entropy of the split's own label rate.
        calibration: mean prediction over label rate.
        label_rate: share of positives.
        gauc: AUC within each group, averaged with the groups' rows as weights; groups of one class
            are left out.
        rows: number of predictions; with weights, of those whose weight is not 0.
    """

    auc: float
    log_loss: float
    normalized_entropy: float
    calibration: float
    label_rate: float
    gauc: float
    rows: int


def compute_metrics(
    logits: Floats,
    labels: Floats,
    groups: Integers | None = None,
    weights: Floats | None = None,
) -> Metrics:
    """All metrics of one split.

    Args:
        logits: (N,) scores before the sigmoid.
        labels: (N,) zeros and ones.
        groups: (N,) group of each row, for GAUC.
        weights: (N,) how much each row counts, at least 0; all the same by default.
    """
    if weights is not None:
        counted = weights > 0
        logits, labels, weights = logits[counted], labels[counted], weights[counted]
        groups = None if groups is None else groups[counted]
    keys = (labels, logits) if weights is None else (weights, labels, logits)
    order = np.lexsort(keys)
    scores, positives = logits[order].astype(np.float64), np.greater(labels[order], 0.5)
    masses = None if weights is None else _masses(weights[order])
    loss = log_loss(scores, positives, masses)
    rate = _mean(positives, masses) if len(positives) else float("nan")
    return Metrics(
        auc=auc(scores, positives, masses),
        log_loss=loss,
        normalized_entropy=_ratio(loss, _entropy(rate)),
        calibration=_ratio(_mean(_sigmoid(scores), masses) if len(scores) else 0.0, rate),
        label_rate=rate,
        gauc=float("nan") if groups is None else gauc(scores, positives, groups[order], masses),
        rows=len(labels),
    )


def auc(scores: Floats, labels: Labels, weights: Masses | None = None) -> float:
    """Area under the ROC curve by counting pairs; NaN when a class is absent.

    Args:
        scores: (N,) any monotone scores.
        labels: (N,) zeros and ones, or booleans.
        weights: (N,) how much each row counts; all the same by default.
    """
    zeros = np.zeros(len(scores), dtype=np.int64)
    areas, pairs, _ = _areas_by_group(scores, labels, zeros, weights)
    # Python's integers: the pairs of a billion rows overflow a float's exact range.
    if not (len(pairs) and pairs[0]):
        return float("nan")
    # Sums of fractions may round to more than there is.
    return min(areas[0].item() / (2 * pairs[0].item()), 1.0)


def gauc(scores: Floats, labels: Labels, groups: Integers, weights: Masses | None = None) -> float:
    """Mean AUC of the groups that hold both classes, weighted by their rows; NaN if none does.

    Args:
        scores: (N,) any monotone scores.
        labels: (N,) zeros and ones, or booleans.
        groups: (N,) group of each row.
        weights: (N,) how much each row counts; all the same by default.
    """
    areas, pairs, rows = _areas_by_group(scores, labels, groups, weights)
    both = pairs > 0
    if not both.any():
        return float("nan")
    aucs = areas[both] / (2 * pairs[both])
    return float(np.sum(aucs * rows[both]) / np.sum(rows[both]))


def log_loss(logits: Floats, labels: Labels, weights: Masses | None = None) -> float:
    """Mean binary cross-entropy of (N,) logits, in float64; NaN without rows."""
    if not len(logits):
        return float("nan")
    signed = np.where(np.greater(labels, 0.5), -1.0, 1.0) * logits.astype(np.float64)
    return _mean(np.logaddexp(0.0, signed), weights)


def _masses(weights: Floats) -> Masses:
    """Weights as integers where they are whole and their pairs can be counted, else as float64."""
    numbers = weights.astype(np.float64)
    if np.array_equal(numbers, np.rint(numbers)) and numbers.sum() < _COUNTED:
        return numbers.astype(np.int64)
    return numbers


def _mean(values: Labels, weights: Masses | None) -> float:
    if weights is None:
        return float(np.mean(values))
    return float(np.sum(values * weights) / np.sum(weights))


def _areas_by_group(
    scores: Floats, labels: Labels, groups: Integers, weights: Masses | None = None
) -> tuple[Masses, Masses, Masses]:
    """Twice the pairs won (ties one each), the pairs, and the rows of every group, as integers."""
    if not len(scores):
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty
    order = np.lexsort((scores, groups))
    scores, groups = scores[order], groups[order]
    positive = np.greater(labels[order], 0.5)
    new_group = np.r_[True, groups[1:] != groups[:-1]]
    new_tie = new_group | np.r_[True, scores[1:] != scores[:-1]]
    ties = np.flatnonzero(new_tie)  # first row of each run of equal scores
    tie_positive: Masses
    tie_negative: Masses
    if weights is None:
        tie_positive = np.add.reduceat(positive.astype(np.int64), ties)
        tie_negative = np.diff(np.r_[ties, len(scores)]) - tie_positive
    else:
        tie_positive = np.add.reduceat(weights[order] * positive, ties)
        tie_negative = np.add.reduceat(weights[order] * ~positive, ties)
    starts = np.flatnonzero(new_group[ties])  # first run of each group
    below = np.cumsum(tie_negative) - tie_negative
    group_of_tie = np.cumsum(new_group[ties]) - 1
    below -= below[starts][group_of_tie]
    areas = np.add.reduceat(tie_positive * (2 * below + tie_negative), starts)
    won = np.add.reduceat(tie_positive, starts)
    lost = np.add.reduceat(tie_negative, starts)
    return areas, won * lost, won + lost


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -logits))


def _entropy(rate: float) -> float:
    if not 0 < rate < 1:
        return 0.0
    return float(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def _ratio(value: float, by: float) -> float:
    return value / by if by > 0 else float("nan")
