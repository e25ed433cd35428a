"""The chosen candidates, retrained in full on several seeds: only here are test data looked at.

Finals are a study of their own, so that workers share them, and a search that is killed goes on
here as well. What is chosen depends on the validation split alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState
from typing_extensions import override

from embcomp.io.atomic_files import write_atomically
from embcomp.search.attempts import KIND, latest_attempts, number_of
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.evaluators.base import Evaluator, Task, TrialHandle, TrialResult
from embcomp.search.evaluators.trial_pruning import front_of
from embcomp.search.samplers.optuna_sampler import RepairedSampler
from embcomp.search.space.recipes import config_of, point_yaml
from embcomp.search.space.space import Candidate, Space
from embcomp.search.trials.worker import TrialRunner
from embcomp.tables.budget import format_bytes


@dataclass(frozen=True, kw_only=True)
class SelectedCandidate:
    """A chosen candidate.

    Args:
        name: of its recipe.
        number: of its trial.
        kind: how it was proposed.
        candidate: what it is.
        quality: its metric in the search.
        serve_bytes: its size.
        seeds: of its runs.
        baseline: whether it is here to be compared with.
    """

    name: str
    number: int
    kind: str
    candidate: Candidate
    quality: float
    serve_bytes: int
    seeds: tuple[int, ...]
    baseline: bool = False

    @classmethod
    def of(
        cls,
        trial: FrozenTrial,
        candidate: Candidate,
        *,
        name: str,
        seeds: tuple[int, ...],
        baseline: bool = False,
    ) -> SelectedCandidate:
        """What a scored trial tried, to be retrained."""
        return cls(
            name=name,
            number=number_of(trial),
            kind=trial.user_attrs.get(KIND, ""),
            candidate=candidate,
            quality=trial.values[0],
            serve_bytes=trial.user_attrs["serve_bytes"],
            seeds=seeds,
            baseline=baseline,
        )


def select_candidates(
    config: SearchConfig, study: optuna.Study, sampler: RepairedSampler
) -> list[SelectedCandidate]:
    """The best candidates by validation score, or a spread of the front; and the equal share.

    The equal share is retrained beside them when it was tried, as what they must beat, unless the
    search does without.
    """
    done = completed(study, sampler)
    uniform = next(
        (c for c, trial in done.items() if trial.user_attrs.get(KIND) == "uniform"), None
    )
    chosen = _best(config, study, done)[: config.finals.points]
    wanted = config.finals.points and config.finals.baseline
    if wanted and uniform is not None and uniform not in chosen:
        chosen.append(uniform)
    seeds = tuple(config.seed + 1 + i for i in range(config.finals.seeds))
    return [
        SelectedCandidate.of(
            done[candidate],
            candidate,
            name=f"{config.name}_{place + 1}",
            seeds=seeds,
            baseline=candidate == uniform,
        )
        for place, candidate in enumerate(chosen)
    ]


def completed(study: optuna.Study, sampler: RepairedSampler) -> dict[Candidate, FrozenTrial]:
    """Every candidate that was scored, with its trial, in the order in which they were proposed."""
    done: dict[Candidate, FrozenTrial] = {}
    for trial in latest_attempts(study):
        candidate = sampler.candidate(trial)
        if trial.state is TrialState.COMPLETE and candidate is not None:
            done.setdefault(candidate, trial)
    return done


def _best(
    config: SearchConfig, study: optuna.Study, done: dict[Candidate, FrozenTrial]
) -> list[Candidate]:
    signs = [1 if d == optuna.study.StudyDirection.MINIMIZE else -1 for d in study.directions]
    points = {c: tuple(s * v for s, v in zip(signs, t.values)) for c, t in done.items()}
    if len(signs) == 1:
        return sorted(points, key=lambda candidate: (points[candidate], number_of(done[candidate])))
    everyone = list(points)
    fronts = front_of([points[candidate] for candidate in everyone])
    front = sorted((c for c, f in zip(everyone, fronts) if f == 0), key=lambda c: points[c])
    count = min(config.finals.points, len(front))
    if count < 2:
        return front[:count]
    return [front[i * (len(front) - 1) // (count - 1)] for i in range(count)]


def finals_name(config: SearchConfig, points: Sequence[SelectedCandidate], what: str) -> str:
    """The study's name: one for each choice of points, as a longer search may choose others."""
    chosen = json.dumps([[p.number, list(p.candidate), list(p.seeds)] for p in points])
    return f"{config.name} {what} {hashlib.sha256(chosen.encode()).hexdigest()[:8]}"


def write_recipes(
    space: Space, points: Sequence[SelectedCandidate], folder: Path
) -> dict[str, Path]:
    """An ordinary training YAML for each point, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for point in points:
        config = config_of(space, point.candidate, point.name)
        size = format_bytes(point.serve_bytes)
        comment = f"Found by a search: {size} of tables, candidate {point.number} ({point.kind})."
        paths[point.name] = folder / f"{point.name}.yaml"
        write_atomically(paths[point.name], point_yaml(config, comment))
    return paths


class RetrainingJobs(TrialRunner):
    """The trials of a retraining: each is a candidate and one of its seeds.

    Args:
        quality: the metric.
        points: what was chosen.
        evaluator: trains in full.
    """

    def __init__(
        self, quality: str, points: Sequence[SelectedCandidate], evaluator: Evaluator
    ) -> None:
        self._quality, self._points, self._evaluator = quality, points, evaluator
        seeds = range(len(points[0].seeds))
        self.planned = [{"point": p, "seed": s} for s in seeds for p in range(len(points))]
        self.distributions = {
            "point": IntDistribution(0, len(points) - 1),
            "seed": IntDistribution(0, len(seeds) - 1),
        }

    @override
    def start(self, trial: Trial, slot: int) -> TrialHandle:
        point, seed = self._pair(trial)
        return self._evaluator.start(
            Task(number=point.number, candidate=point.candidate, slot=slot, seed=seed)
        )

    @override
    def line(self, trial: Trial, outcome: TrialResult, what: str) -> str:
        point, seed = self._pair(trial)
        score = "" if outcome.quality is None else f"{self._quality} {outcome.quality:.6f}"
        parts = [what, outcome.message, score, f"{outcome.seconds:.0f} s"]
        return f"{point.name}, seed {seed}, in full: {', '.join(p for p in parts if p)}"

    def _pair(self, trial: Trial) -> tuple[SelectedCandidate, int]:
        point = self._points[trial.params["point"]]
        return point, point.seeds[trial.params["seed"]]
