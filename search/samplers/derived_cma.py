"""CMA-ES whose state is worked out from the study's trials; nothing is pickled into the study.

Optuna's own sampler keeps its optimizer in the study as a pickle, which runs code of whoever may write
there when it is read. Here each trial notes the generation that it was drawn in, as Optuna's does, and
the optimizer is told all finished generations anew for every candidate: a millisecond for each. What
Optuna's sampler has left in an older study is never read.

N. Hansen, A. Ostermeier, "Completely Derandomized Self-Adaptation in Evolution Strategies",
Evolutionary Computation 9(2), 2001; by the library `cmaes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cmaes
import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from typing_extensions import override

GENERATION = "cma:generation"
_PICKLED = "cma:optimizer"  # what Optuna's sampler calls its state


class DerivedCma(BaseSampler):
    """CMA-ES over parameters that are all real numbers.

    Args:
        seed: of this proposal.
        startup: finished trials before anything is modelled; random ones until then.
    """

    def __init__(self, seed: int, startup: int) -> None:
        self._seed, self._startup = seed, startup
        self._random = RandomSampler(seed=seed)

    @override
    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    @override
    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if not search_space or len(complete) < self._startup:
            return {}
        ranges = {name: _range(each) for name, each in search_space.items()}
        sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
        optimizer = told(complete, ranges, sign, seed=self._seed % 2**31)
        study._storage.set_trial_system_attr(trial._trial_id, GENERATION, optimizer.generation)
        drawn = optimizer.ask()
        return {
            name: float(low + share * (high - low))
            for (name, (low, high)), share in zip(ranges.items(), drawn)
        }

    @override
    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def told(
    complete: Sequence[FrozenTrial],
    ranges: Mapping[str, tuple[float, float]],
    sign: float,
    *,
    seed: int,
) -> cmaes.CMA:
    """The optimizer after all generations that are complete.

    Args:
        complete: finished trials, by number.
        ranges: lowest and highest value of each parameter.
        sign: what makes less of a trial's value better.
        seed: of the next draw.
    """
    size = len(ranges)
    optimizer = cmaes.CMA(
        mean=np.full(size, 0.5),
        sigma=1 / 6,
        bounds=np.array([[0.0, 1.0]] * size),
        seed=seed,
        n_max_resampling=10 * size,
    )
    drawn: dict[int, list[tuple[npt.NDArray[np.float64], float]]] = {}
    for trial in complete:
        generation = trial.system_attrs.get(GENERATION)
        if generation is not None and set(ranges) <= set(trial.params):
            point = [_share(trial.params[name], *ranges[name]) for name in ranges]
            drawn.setdefault(generation, []).append((np.array(point), sign * trial.values[0]))
    while len(solutions := drawn.get(optimizer.generation, [])) >= optimizer.population_size:
        optimizer.tell(solutions[: optimizer.population_size])
    return optimizer


def has_pickled_state(study: optuna.Study) -> bool:
    """Whether Optuna's own CMA-ES has left its state in a study."""
    return any(
        name.startswith(_PICKLED)
        for trial in study.get_trials(deepcopy=False)
        for name in trial.system_attrs
    )


def _range(distribution: BaseDistribution) -> tuple[float, float]:
    assert isinstance(distribution, FloatDistribution), "CMA-ES takes the relaxed form"
    return distribution.low, distribution.high


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if math.isclose(low, high) else (value - low) / (high - low)
