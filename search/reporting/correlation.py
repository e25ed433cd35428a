"""How well a supernet ranks: its scores of some candidates against what they reach when retrained.

Weight sharing stands or falls with this, and papers that share weights seldom show it. Candidates are
taken from all over the scores that the search saw, and each is retrained in full, as a final is, on
one seed. The retrained score is that of the validation split; test data say nothing here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray

from embcomp.config.train_config import is_loss
from embcomp.search.attempts import latest_attempts, number_of
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.config.search_sections import LEAST_RANKED
from embcomp.search.samplers.optuna_sampler import RepairedSampler
from embcomp.search.trials.retraining import SelectedCandidate, completed
from embcomp.search.trials.worker import OUTCOME


@dataclass(frozen=True, kw_only=True)
class RankedCandidate:
    """A candidate that was scored and retrained.

    Attributes:
        number: the candidate's.
        kind: how it was proposed.
        serve_bytes: serving bytes of its tables.
        score: its metric in the search.
        retrained: the same metric on the validation split after training in full; None when that
            failed.
        seed: of that training.
        seconds: what it took.
        steps: training steps that it took.
        failure: why it failed.
    """

    number: int
    kind: str
    serve_bytes: int
    score: float
    retrained: float | None
    seed: int
    seconds: float
    steps: int
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Scores of a search against scores of retrained candidates.

    Attributes:
        spearman: correlation of the ranks, ties by their mean rank; None where too few trainings
            succeeded, or all are alike.
        candidates: those that were retrained, the best score first.
        trainings: how many of their trainings were made for this alone, and are not among the
            finals.
        full_trainings: their steps, as a multiple of one full training.
        hours: their time, added up.
    """

    spearman: float | None
    candidates: list[RankedCandidate]
    trainings: int
    full_trainings: float
    hours: float

    def text(self) -> str:
        """The coefficient, for people."""
        return "undefined" if self.spearman is None else f"{self.spearman:.3f}"


def choose_spread(
    config: SearchConfig, study: optuna.Study, sampler: RepairedSampler
) -> list[SelectedCandidate]:
    """The candidates to retrain: the best, the worst, and those closest to even steps between.

    Steps are of the score, so that a search that has settled is not judged by its last candidates
    alone, which differ by less than chance. Equals go by number. There are none to retrain where
    too few were scored.
    """
    done = completed(study, sampler)
    sign = -1 if is_loss(config.quality) else 1
    left = sorted(done, key=lambda c: (-sign * done[c].values[0], number_of(done[c])))
    count = min(config.finals.correlation, len(left))
    if count < LEAST_RANKED:
        return []
    best, worst = (done[left[i]].values[0] for i in (0, -1))
    chosen = []
    for step in range(count):
        wanted = best + (worst - best) * step / max(1, count - 1)
        nearest = min(left, key=lambda c: (abs(done[c].values[0] - wanted), number_of(done[c])))
        left.remove(nearest)
        chosen.append(nearest)
    chosen.sort(key=lambda c: (-sign * done[c].values[0], number_of(done[c])))
    seeds = (config.seed + 1,)
    return [
        SelectedCandidate.of(done[c], c, name=f"candidate {number_of(done[c])}", seeds=seeds)
        for c in chosen
    ]


def correlate(
    study: optuna.Study,
    points: Sequence[SelectedCandidate],
    *,
    among_finals: Collection[tuple[int, int]],
    full_steps: int,
) -> RankCorrelation:
    """Put scores beside retrained scores.

    Args:
        study: of the retrained candidates.
        points: what it retrained.
        among_finals: numbers and seeds that the finals trained anyway.
        full_steps: of one training in full.
    """
    candidates = []
    for trial in latest_attempts(study):
        if not trial.state.is_finished() or "point" not in trial.params:
            continue
        point, outcome = points[trial.params["point"]], trial.user_attrs.get(OUTCOME, {})
        candidates.append(
            RankedCandidate(
                number=point.number,
                kind=point.kind,
                serve_bytes=point.serve_bytes,
                score=point.quality,
                retrained=outcome.get("quality"),
                seed=point.seeds[0],
                seconds=outcome.get("seconds", 0.0),
                steps=outcome.get("steps", 0),
                failure=outcome.get("failure", ""),
            )
        )
    both = [(c.score, c.retrained) for c in candidates if c.retrained is not None]
    own = [c for c in candidates if (c.number, c.seed) not in among_finals]
    return RankCorrelation(
        spearman=spearman(*zip(*both)) if len(both) >= LEAST_RANKED else None,
        candidates=candidates,
        trainings=len(own),
        full_trainings=sum(c.steps for c in own) / max(1, full_steps),
        hours=sum(c.seconds for c in own) / 3600,
    )


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Correlation of ranks, ties by their mean rank; None where either has fewer than two values."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(np.corrcoef(mean_ranks(one), mean_ranks(other))[0, 1])


def mean_ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Ranks from 1 in ascending order; equal values share the mean of theirs."""
    _, group, sizes = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[group]
