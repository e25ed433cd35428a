"""Learning rates and settings to try: the same first ones for everyone, then what Optuna's TPE proposes.

What is proposed for a round follows from the scores of the rounds before it and from the benchmark's
seed alone, not from who was quicker, so that a benchmark of several workers, one that was killed and
one that ran through try the same.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from embcomp.benchmark.benchmark_config import BenchmarkConfig
from embcomp.benchmark.cells import Cell, PreparedBenchmark
from embcomp.benchmark.planned_runs import Tuned
from embcomp.config.train_config import is_loss

_PLASTIC = 1.324717957244746  # x**3 = x + 1: Roberts' evenly spread points in two dimensions
_DIGITS = 4  # of a learning rate
_ATTEMPTS = 32  # at something that was not tried before


@dataclass(frozen=True, kw_only=True)
class TuningTrial:
    """One trial of a cell.

    Attributes:
        tuned: what was tried.
        quality: the validation metric; None where training failed.
        seconds: what it took.
        failure: why it failed.
    """

    tuned: Tuned
    quality: float | None
    seconds: float
    failure: str = ""


def round_sizes(config: BenchmarkConfig) -> list[int]:
    """How many trials a cell gets in each round; the first rounds take what does not divide."""
    trials, rounds = config.tuning.trials, config.tuning.rounds
    return [trials // rounds + (place < trials % rounds) for place in range(rounds)]


def propose(
    prepared: PreparedBenchmark, cell: Cell, past: Sequence[TuningTrial], count: int
) -> list[Tuned]:
    """What a cell tries in the next round.

    Args:
        prepared: the benchmark.
        cell: whose trials they are.
        past: its trials of the rounds before.
        count: how many to propose; fewer come where everything has been tried.
    """
    known = [dict(each.tuned) for each in past]
    found: list[Tuned] = []
    if not past:
        source = iter(_first_ones(prepared, cell, count + _ATTEMPTS))
    else:
        source = iter(_by_tpe(prepared.config, cell, past, count + _ATTEMPTS))
    for tuned in source:
        if dict(tuned) not in known:
            known.append(dict(tuned))
            found.append(tuned)
        if len(found) == count:
            break
    return found


def best_of(config: BenchmarkConfig, tried: Sequence[TuningTrial]) -> TuningTrial | None:
    """The trial with the best validation metric, the earliest of equals; None where all failed."""
    sign = -1 if is_loss(config.quality) else 1
    done = [each for each in tried if each.quality is not None]
    return max(done, key=lambda each: sign * (each.quality or 0.0), default=None)


def _first_ones(prepared: PreparedBenchmark, cell: Cell, count: int) -> list[Tuned]:
    """The recipe's own rates, then points that are evenly spread, the same for every cell."""
    tuning, train = prepared.config.tuning, prepared.base.train
    bounds = {"row": tuning.row_learning_rate, "dense": tuning.dense_learning_rate}
    own = {
        "row": train.row_optimizer.learning_rate,
        "dense": train.dense_optimizer.learning_rate,
    }
    first = {key: _rounded(min(max(own[key], low), high)) for key, (low, high) in bounds.items()}
    found: list[Tuned] = [{**first, "settings": 0}]
    for place in range(1, count):
        at = [(0.5 + place / _PLASTIC**power) % 1 for power in (1, 2)]
        rates = {
            key: _rounded(math.exp(math.log(low) + part * math.log(high / low)))
            for (key, (low, high)), part in zip(bounds.items(), at)
        }
        found.append({**rates, "settings": place % len(cell.combinations)})
    return found


def _by_tpe(
    config: BenchmarkConfig, cell: Cell, past: Sequence[TuningTrial], count: int
) -> list[Tuned]:
    tuning = config.tuning
    space: dict[str, BaseDistribution] = {
        "row": FloatDistribution(*tuning.row_learning_rate, log=True),
        "dense": FloatDistribution(*tuning.dense_learning_rate, log=True),
        "settings": CategoricalDistribution(list(range(len(cell.combinations)))),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=2, multivariate=True, constant_liar=True, seed=_seed_of(config, cell)
        )
    study = optuna.create_study(
        sampler=sampler, direction="minimize" if is_loss(config.quality) else "maximize"
    )
    for each in past:
        state = TrialState.FAIL if each.quality is None else TrialState.COMPLETE
        study.add_trial(
            create_trial(
                params=dict(each.tuned), distributions=space, value=each.quality, state=state
            )
        )
    found: list[Tuned] = []
    for _ in range(count):
        params = study.ask(space).params
        rates = {key: _rounded(params[key]) for key in ("row", "dense")}
        found.append({**rates, "settings": params["settings"]})
    return found


def _seed_of(config: BenchmarkConfig, cell: Cell) -> int:
    text = f"{config.seed} {cell.model} {cell.method} {cell.budget}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def _rounded(rate: float) -> float:
    return float(f"{rate:.{_DIGITS}g}")
