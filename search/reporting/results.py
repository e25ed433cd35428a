"""What a search found, as `search_result.json` holds it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from embcomp.config.train_config import is_loss
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import EmbcompError, one_line
from embcomp.io.atomic_files import write_atomically
from embcomp.io.json_values import plain_json
from embcomp.search.attempts import KIND, latest_attempts, number_of
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.evaluators.base import Evaluator
from embcomp.search.evaluators.trial_pruning import front_of
from embcomp.search.reporting.correlation import RankCorrelation, RankedCandidate
from embcomp.search.reporting.importance import importances
from embcomp.search.samplers.optuna_sampler import RepairedSampler
from embcomp.search.space.repair import Repair
from embcomp.search.space.space import Space
from embcomp.search.trials.retraining import SelectedCandidate
from embcomp.search.trials.worker import OUTCOME, STOPPED

RESULT_FILE = "search_result.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """One line of the search.

    Attributes:
        number: the candidate's.
        kind: how it was proposed.
        state: `complete`, `stopped early`, or why it failed.
        values: the objectives, where it has them.
        serve_bytes: serving bytes of its tables.
        train_bytes: training bytes of its tables.
        options: the choice of each unit.
        seconds: what it took.
        steps: training steps that it took.
        message: what went wrong.
    """

    number: int
    kind: str
    state: str
    values: dict[str, float]
    serve_bytes: int
    train_bytes: int
    options: dict[str, str]
    seconds: float
    steps: int
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class FinalRunResult:
    """One run in full.

    Attributes:
        seed: its seed.
        valid: validation metrics of the best step; None when it failed.
        test: test metrics of the best step.
        seconds: what it took.
        steps: training steps that it took.
        failure: why it failed.
    """

    seed: int
    valid: dict[str, float] | None
    test: dict[str, float] | None
    seconds: float
    steps: int
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """A chosen candidate.

    Attributes:
        name: of its recipe.
        number: the candidate's.
        kind: how it was proposed.
        baseline: whether it is there to be compared with.
        recipe: its YAML, relative to the search's folder.
        quality: its metric in the search.
        serve_bytes: serving bytes of its tables.
        options: the choice of each unit.
        share: bytes over full bytes of each unit.
        bytes_per_rank: bytes on each device as the planner places it; None without a topology.
        runs: its runs in full.
    """

    name: str
    number: int
    kind: str
    baseline: bool
    recipe: str
    quality: float
    serve_bytes: int
    options: dict[str, str]
    share: dict[str, float]
    bytes_per_rank: list[int] | None
    runs: list[FinalRunResult]

    def metrics(self, metric: str, split: str) -> list[float]:
        """A metric of the runs that have it."""
        found = [run.test if split == "test" else run.valid for run in self.runs]
        return [m[metric] for m in found if m is not None and metric in m]


@dataclass(frozen=True, kw_only=True)
class SearchCost:
    """What a search took.

    Attributes:
        trainings: candidates that were trained, stopped ones included.
        full_trainings: their steps, as a multiple of one full training.
        hours: their time, added up.
        prepared_trainings: steps of what was trained once for all scores, as a multiple of one full
            training.
        prepared_hours: the time of its training steps and searches.
        finals: runs in full.
        finals_hours: their time, added up.
    """

    trainings: int
    full_trainings: float
    hours: float
    finals: int
    finals_hours: float
    prepared_trainings: float = 0.0
    prepared_hours: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Everything that a search found.

    Attributes:
        name: the search's.
        recipe: the training recipe.
        model: the model's name.
        dataset: the dataset's name.
        sampler: where candidates came from.
        objectives: what was searched for; the first is the metric.
        budget: serving bytes.
        full_bytes: serving bytes uncompressed.
        fidelity: how much training a candidate got.
        space_size: number of candidates in the space.
        reachable: serving bytes of the smallest and the largest.
        rows: rows of each unit.
        notes: what was dropped.
        candidates: all of them.
        front: numbers of the candidates that no other beats in metric and bytes.
        points: what was chosen and retrained.
        importance: share of the metric's variance that each unit's choice explains.
        cost: what it took.
        format: version of this file.
        split: the split of the metrics in full.
        evaluator: what scored candidates.
        correlation: how well scores rank candidates, where that was asked for.
    """

    name: str
    recipe: str
    model: str
    dataset: str
    sampler: str
    objectives: list[str]
    budget: int
    full_bytes: int
    fidelity: str
    space_size: int
    reachable: list[int]
    rows: dict[str, int]
    notes: list[str]
    candidates: list[CandidateResult]
    front: list[int]
    points: list[PointResult]
    importance: dict[str, float]
    cost: SearchCost
    format: int = FORMAT
    split: str = field(default="test")
    evaluator: str = "training"
    correlation: RankCorrelation | None = None

    def save(self, folder: Path) -> None:
        """Write search_result.json."""
        text = json.dumps(plain_json(dataclasses.asdict(self)), indent=1) + "\n"
        write_atomically(folder / RESULT_FILE, text)

    @classmethod
    def load(cls, folder: str | Path) -> SearchResult:
        """The result of a finished search."""
        path = Path(folder) / RESULT_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["candidates"] = [CandidateResult(**c) for c in content["candidates"]]
            for point in content["points"]:
                point["runs"] = [FinalRunResult(**run) for run in point["runs"]]
            content["points"] = [PointResult(**point) for point in content["points"]]
            content["cost"] = SearchCost(**content["cost"])
            if ranked := content.get("correlation"):
                ranked["candidates"] = [RankedCandidate(**c) for c in ranked["candidates"]]
                content["correlation"] = RankCorrelation(**ranked)
            return cls(**content)
        except FileNotFoundError:
            raise EmbcompError(
                f"{folder} has no {RESULT_FILE}: the search has not finished; start it again"
            ) from None
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise EmbcompError(
                f"{path} is not a result of this version: {one_line(error)}"
            ) from None

    def summary(self) -> list[tuple[str, ...]]:
        """The chosen points as cells: name, bytes, metric in the search, metric in full."""
        metric = self.objectives[0]
        lines: list[tuple[str, ...]] = []
        for point in self.points:
            values = point.metrics(metric, self.split)
            spread = f" ± {statistics.stdev(values):.6f}" if len(values) > 1 else ""
            full = f"{statistics.mean(values):.6f}{spread}" if values else "-"
            name = f"{point.name} (baseline)" if point.baseline else point.name
            lines.append((name, f"{point.serve_bytes:,}", f"{point.quality:.6f}", full, point.kind))
        return lines


def gather(
    config: SearchConfig,
    repair: Repair,
    sampler: RepairedSampler,
    study: optuna.Study,
    points: Sequence[SelectedCandidate],
    finals: optuna.Study | None,
    evaluator: Evaluator,
    correlation: RankCorrelation | None = None,
) -> SearchResult:
    """Put a search's result together from its studies."""
    space = repair.space
    info = DatasetInfo.load(space.base.data.path)
    trials = [t for t in latest_attempts(study) if t.state.is_finished()]
    candidates = [_candidate(config, trial) for trial in trials]
    done = [c for c in candidates if c.state == "complete"]
    sign = 1 if is_loss(config.quality) else -1
    fronts = front_of([(sign * c.values[config.quality], float(c.serve_bytes)) for c in done])
    runs = _final_runs(finals, points)
    steps = sum(c.steps for c in candidates)
    final = [run for each in runs.values() for run in each]
    has_test = bool(final) and all(run.test for run in final if run.valid)
    return SearchResult(
        name=config.name,
        recipe=config.recipe,
        model=space.base.model.name,
        dataset=info.name,
        sampler=config.sampler.name,
        objectives=list(config.objectives),
        budget=repair.budget,
        full_bytes=space.full_bytes,
        evaluator=config.evaluator.name,
        fidelity=evaluator.fidelity,
        space_size=space.size,
        reachable=list(repair.reachable),
        rows={unit.name: unit.rows for unit in space.units},
        notes=list(space.notes),
        candidates=candidates,
        front=[c.number for c, front in zip(done, fronts) if front == 0],
        points=[_point(repair, point, runs.get(point.name, [])) for point in points],
        importance=importances(
            [_chosen(space, c.options) for c in done], [c.values[config.quality] for c in done]
        ),
        cost=SearchCost(
            trainings=sum(1 for c in candidates if c.steps),
            full_trainings=steps / max(1, evaluator.full_steps),
            hours=sum(c.seconds for c in candidates) / 3600,
            finals=len(final),
            finals_hours=sum(run.seconds for run in final) / 3600,
            prepared_trainings=evaluator.prepared.steps / max(1, evaluator.full_steps),
            prepared_hours=evaluator.prepared.seconds / 3600,
        ),
        split="test" if has_test or not final else "valid",
        correlation=correlation,
    )


def _candidate(config: SearchConfig, trial: FrozenTrial) -> CandidateResult:
    outcome = trial.user_attrs.get(OUTCOME, {})
    state = "complete"
    values: dict[str, float] = {}
    if trial.state is TrialState.COMPLETE:
        values = dict(zip(config.objectives, trial.values))
    elif trial.state is TrialState.PRUNED:
        state = f"stopped early at step {trial.user_attrs.get(STOPPED)}"
    else:
        state = outcome.get("failure", "its workers died")
    return CandidateResult(
        number=number_of(trial),
        kind=trial.user_attrs.get(KIND, ""),
        state=state,
        values=values,
        serve_bytes=trial.user_attrs.get("serve_bytes", 0),
        train_bytes=trial.user_attrs.get("train_bytes", 0),
        options=trial.user_attrs.get("options", {}),
        seconds=outcome.get("seconds", 0.0),
        steps=outcome.get("steps", 0),
        message=outcome.get("message", ""),
    )


def _chosen(space: Space, options: dict[str, str]) -> dict[str, str]:
    return {u.name: options[u.name] for u in space.units if len(u.options) > 1}


def _point(repair: Repair, point: SelectedCandidate, runs: list[FinalRunResult]) -> PointResult:
    space = repair.space
    per_rank = None
    if repair.devices.limits.query is not None:
        per_rank = repair.devices.place(point.candidate).bytes_per_rank()
    return PointResult(
        name=point.name,
        number=point.number,
        kind=point.kind,
        baseline=point.baseline,
        recipe=f"points/{point.name}.yaml",
        quality=point.quality,
        serve_bytes=point.serve_bytes,
        options=space.labels(point.candidate),
        share={
            unit.name: unit.options[place].bytes / unit.full_bytes
            for unit, place in zip(space.units, point.candidate)
        },
        bytes_per_rank=per_rank,
        runs=runs,
    )


def _final_runs(
    finals: optuna.Study | None, points: Sequence[SelectedCandidate]
) -> dict[str, list[FinalRunResult]]:
    found: dict[str, list[FinalRunResult]] = {}
    for trial in latest_attempts(finals) if finals is not None else []:
        if not trial.state.is_finished() or "point" not in trial.params:
            continue
        point = points[trial.params["point"]]
        outcome: dict[str, Any] = trial.user_attrs.get(OUTCOME, {})
        details = outcome.get("details", {})
        found.setdefault(point.name, []).append(
            FinalRunResult(
                seed=point.seeds[trial.params["seed"]],
                valid=details.get("valid"),
                test=details.get("test") or None,
                seconds=outcome.get("seconds", 0.0),
                steps=outcome.get("steps", 0),
                failure=outcome.get("failure", ""),
            )
        )
    return {name: sorted(runs, key=lambda run: run.seed) for name, runs in found.items()}
