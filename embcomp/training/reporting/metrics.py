"""Exact metrics of a set of predictions: nothing is binned or sampled.

AUC counts pairs in integers, and sums run over predictions in sorted order, so that results do not
depend on how rows were spread over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32] | NDArray[np.float64]
Labels = Floats | NDArray[np.bool_]
Integers = NDArray[np.integer]


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
        rows: number of predictions.
    """

    auc: float
    log_loss: float
    normalized_entropy: float
    calibration: float
    label_rate: float
    gauc: float
    rows: int


def compute_metrics(logits: Floats, labels: Floats, groups: Integers | None = None) -> Metrics:
    """All metrics of one split.

    Args:
        logits: (N,) scores before the sigmoid.
        labels: (N,) zeros and ones.
        groups: (N,) group of each row, for GAUC.
    """
    order = np.lexsort((labels, logits))
    scores, positives = logits[order].astype(np.float64), np.greater(labels[order], 0.5)
    loss = log_loss(scores, positives)
    rate = float(np.mean(positives)) if len(positives) else float("nan")
    return Metrics(
        auc=auc(scores, positives),
        log_loss=loss,
        normalized_entropy=_ratio(loss, _entropy(rate)),
        calibration=_ratio(float(np.mean(_sigmoid(scores))) if len(scores) else 0.0, rate),
        label_rate=rate,
        gauc=float("nan") if groups is None else gauc(logits, labels, groups),
        rows=len(labels),
    )


def auc(scores: Floats, labels: Labels) -> float:
    """Area under the ROC curve by counting pairs; NaN when a class is absent.

    Args:
        scores: (N,) any monotone scores.
        labels: (N,) zeros and ones, or booleans.
    """
    zeros = np.zeros(len(scores), dtype=np.int64)
    areas, pairs, _ = _areas_by_group(scores, labels, zeros)
    # Python's integers: the pairs of a billion rows overflow a float's exact range.
    return int(areas[0]) / int(2 * pairs[0]) if len(pairs) and pairs[0] else float("nan")


def gauc(scores: Floats, labels: Floats, groups: Integers) -> float:
    """Mean AUC of the groups that hold both classes, weighted by their rows; NaN if none does.

    Args:
        scores: (N,) any monotone scores.
        labels: (N,) zeros and ones.
        groups: (N,) group of each row.
    """
    areas, pairs, rows = _areas_by_group(scores, labels, groups)
    both = pairs > 0
    if not both.any():
        return float("nan")
    aucs = areas[both] / (2 * pairs[both])
    return float(np.sum(aucs * rows[both]) / np.sum(rows[both]))


def log_loss(logits: Floats, labels: Labels) -> float:
    """Mean binary cross-entropy of (N,) logits, in float64; NaN without rows."""
    if not len(logits):
        return float("nan")
    signed = np.where(np.greater(labels, 0.5), -1.0, 1.0) * logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, signed)))


def _areas_by_group(
    scores: Floats, labels: Labels, groups: Integers
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Twice the pairs won (ties one each), the pairs, and the rows of every group, as integers."""
    if not len(scores):
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty
    order = np.lexsort((scores, groups))
    scores, groups = scores[order], groups[order]
    positive = np.greater(labels[order], 0.5).astype(np.int64)
    new_group = np.r_[True, groups[1:] != groups[:-1]]
    new_tie = new_group | np.r_[True, scores[1:] != scores[:-1]]
    ties = np.flatnonzero(new_tie)  # first row of each run of equal scores
    tie_positive = np.add.reduceat(positive, ties)
    tie_negative = np.diff(np.r_[ties, len(scores)]) - tie_positive
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
