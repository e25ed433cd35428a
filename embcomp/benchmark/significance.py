"""What a difference of AUC is worth: standard errors, and a paired bootstrap over rows and seeds.

The standard error is that of Hanley and McNeil, "The meaning and use of the area under a receiver
operating characteristic (ROC) curve", Radiology 143, 1982: it is all but that of the number of positives.
Methods are scored on the same rows, so that most of it is common to them and cancels in a difference;
the bootstrap (Efron, 1979) draws rows, and the seeds that both have, and looks at the difference alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
"""At which one method is said to be better than another."""
_DRAWN_AT_ONCE = 1 << 25  # bytes of drawn counts that are held at once
_RANKED_AT_ONCE = 1 << 30  # bytes of ranked rows that are held at once
_BYTES_OF_A_RANKED_ROW = 16


def auc_standard_error(auc: float, positives: int, negatives: int) -> float:
    """The standard error of one AUC over the rows that might have been drawn.

    Args:
        auc: the AUC.
        positives: rows of the split that are positive.
        negatives: the others.

    Returns:
        Hanley and McNeil's; NaN without rows of both kinds.
    """
    if min(positives, negatives) < 1 or not 0 <= auc <= 1:
        return math.nan
    by_positive, by_negative = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    variance = (
        auc * (1 - auc)
        + (positives - 1) * (by_positive - auc * auc)
        + (negatives - 1) * (by_negative - auc * auc)
    ) / (positives * negatives)
    return math.sqrt(max(0.0, variance))


@dataclass(frozen=True)
class RankedRows:
    """What an AUC over drawn rows needs of the scores of all rows.

    Args:
        positives: (P,) rows that are positive.
        negatives: (N,) the others, by rising score.
        below: (P,) how many negatives have a lower score than each positive.
        not_above: (P,) how many have no higher one.
    """

    positives: NDArray[np.int64]
    negatives: NDArray[np.int64]
    below: NDArray[np.int64]
    not_above: NDArray[np.int64]

    @classmethod
    def of(cls, logits: NDArray[np.float32], labels: NDArray[np.float32]) -> RankedRows:
        """Rank the rows of a split.

        Args:
            logits: (R,) scores.
            labels: (R,) zeros and ones.
        """
        is_positive = labels > 0.5
        positives, negatives = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)
        negatives = negatives[np.argsort(logits[negatives], kind="stable")]
        ranked = logits[negatives]
        return cls(
            positives=positives,
            negatives=negatives,
            below=np.searchsorted(ranked, logits[positives], side="left"),
            not_above=np.searchsorted(ranked, logits[positives], side="right"),
        )

    def aucs(self, counts: NDArray[np.integer]) -> NDArray[np.float64]:
        """The AUC of each draw; a tie counts half.

        Args:
            counts: (B, R) how often each row was drawn.

        Returns:
            (B,), NaN where no row of one kind was drawn.
        """
        drawn = counts[:, self.negatives]
        sums = np.zeros((len(counts), len(self.negatives) + 1), dtype=np.int64)
        np.cumsum(drawn, axis=1, out=sums[:, 1:])
        weights = counts[:, self.positives].astype(np.int64)
        won = (weights * (sums[:, self.below] + sums[:, self.not_above])).sum(axis=1)
        pairs = 2 * weights.sum(axis=1) * sums[:, -1]
        with np.errstate(invalid="ignore"):
            return np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan)


class RowBootstrap:
    """AUCs of runs over the same draws of the same rows.

    Args:
        labels: (R,) of the split.
        resamples: how many draws.
        seed: of the draws.
    """

    def __init__(self, labels: NDArray[np.float32], *, resamples: int, seed: int) -> None:
        self._labels, self._resamples, self._seed = labels, resamples, seed

    def aucs(
        self, runs: Sequence[str], read: Callable[[str], NDArray[np.float32]]
    ) -> dict[str, NDArray[np.float64]]:
        """The AUC of each run on each draw.

        Args:
            runs: what the runs are called.
            read: gives the (R,) logits of a run.

        Returns:
            (B,) for each run.
        """
        rows = len(self._labels)
        together = max(1, _RANKED_AT_ONCE // max(1, _BYTES_OF_A_RANKED_ROW * rows))
        found: dict[str, NDArray[np.float64]] = {}
        for start in range(0, len(runs), together):
            part = runs[start : start + together]
            found |= self._aucs({name: RankedRows.of(read(name), self._labels) for name in part})
        return found

    def _aucs(self, ranked: Mapping[str, RankedRows]) -> dict[str, NDArray[np.float64]]:
        rows = len(self._labels)
        generator = np.random.default_rng(self._seed)
        each_time = max(1, min(self._resamples, _DRAWN_AT_ONCE // max(1, 8 * rows)))
        parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in ranked}
        for start in range(0, self._resamples, each_time):
            draws = min(each_time, self._resamples - start)
            counts = np.stack([_drawn(generator, rows) for _ in range(draws)])
            for name, each in ranked.items():
                parts[name].append(each.aucs(counts))
        return {name: np.concatenate(found) for name, found in parts.items()}


def _drawn(generator: np.random.Generator, rows: int) -> NDArray[np.int64]:
    return np.bincount(generator.integers(0, rows, rows), minlength=rows)


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """One method against another on the same rows and seeds.

    Attributes:
        difference: mean difference of their AUCs over the seeds that both have.
        low: 2.5 % of the draws are below it.
        high: 2.5 % are above it.
        p: how often a draw shows no advantage: one-sided, at least one in all draws and one.
        seeds: how many seeds both have.
    """

    difference: float
    low: float
    high: float
    p: float
    seeds: int

    @property
    def is_better(self) -> bool:
        """Whether the first is better than the second at the level of 5 %."""
        return self.p < LEVEL


def paired_difference(
    ours: Mapping[int, float],
    theirs: Mapping[int, float],
    our_draws: Mapping[int, NDArray[np.float64]],
    their_draws: Mapping[int, NDArray[np.float64]],
    *,
    seed: int,
) -> PairedDifference | None:
    """Compare two methods by the seeds that both were trained with.

    A draw takes rows, the same for both, and as many seeds as there are, with replacement; with one seed
    it says nothing of what another seed would do.

    Args:
        ours: test AUC by seed.
        theirs: of the other method.
        our_draws: (B,) AUCs of the drawn rows, by seed.
        their_draws: of the other method.
        seed: of the draws of seeds.

    Returns:
        None where no seed is common to both, or no draw has rows of both kinds.
    """
    seeds = [each for each in our_draws if each in their_draws]
    if not seeds:
        return None
    differences = np.stack([our_draws[each] - their_draws[each] for each in seeds])  # (S, B)
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, len(seeds), differences.shape)
    means = np.take_along_axis(differences, chosen, axis=0).mean(axis=0)
    means = means[np.isfinite(means)]
    if not len(means):
        return None
    low, high = np.quantile(means, [0.025, 0.975])
    mean = sum(ours[each] - theirs[each] for each in seeds) / len(seeds)
    return PairedDifference(
        difference=mean,
        low=float(low),
        high=float(high),
        p=float((1 + np.count_nonzero(means <= 0)) / (1 + len(means))),
        seeds=len(seeds),
    )


def swallowed(aucs: Sequence[float], standard_error: float) -> bool:
    """Whether one AUC's standard error is as large as all differences between methods."""
    known = [each for each in aucs if math.isfinite(each)]
    return len(known) > 1 and max(known) - min(known) <= standard_error
