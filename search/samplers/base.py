"""Where candidates come from, whatever scores them.

A source proposes one candidate at a time from what was tried before. Optuna's samplers are in
`optuna_sampler`; these need no model. What a source proposes is repaired before it is tried.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from optuna import Study
from optuna.trial import FrozenTrial, TrialState
from typing_extensions import override

from embcomp.errors import ConfigError
from embcomp.search.attempts import next_of
from embcomp.search.samplers.baselines import starts, uniform
from embcomp.search.samplers.candidate_encoding import Parameters
from embcomp.search.space.repair import Repair
from embcomp.search.space.space import Candidate
from embcomp.search.space.untried import MOST_LISTED

MOST_IN_GRID = MOST_LISTED


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate that was scored.

    Args:
        rank: how many were proposed before it.
        candidate: what was trained.
        quality: its metric, more is better; None while it runs, or when it failed.
        running: whether its score is still to come.
    """

    rank: int
    candidate: Candidate
    quality: float | None
    running: bool


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What a source proposes.

    Args:
        candidate: before repair.
        kind: why, for people.
        fill: whether it is to be brought up to the budget; None leaves that to the search.
        parameters: as Optuna proposed them.
    """

    candidate: Candidate
    kind: str
    fill: bool | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What a source may look at.

    Args:
        rank: how many candidates were proposed before this one.
        tried: all of them.
        study: the study behind them.
        trial: the study's record of this one.
    """

    rank: int
    tried: Sequence[Tried]
    study: Study
    trial: FrozenTrial

    @property
    def candidates(self) -> list[Candidate]:
        """Those that were tried."""
        return [one.candidate for one in self.tried]


class CandidateSampler(ABC):
    """Proposes candidates."""

    count: int | None = None
    """How many there are; None when there is no end."""

    def ready(self, rank: int, tried: Sequence[Tried]) -> bool:
        """Whether the next candidate can be proposed without waiting for scores."""
        return True

    @abstractmethod
    def propose(self, asked: Asked) -> Proposal:
        """The candidate of this rank."""

    def adopt(self, asked: Asked) -> None:  # noqa: B027, optional
        """Take in a candidate that comes from elsewhere, as a start or a second attempt."""

    def before(self, study: Study, trial: FrozenTrial) -> None:  # noqa: B027, optional
        """Called before a trial's parameters are drawn."""

    def after(  # noqa: B027, optional
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Called before a trial's result is written."""


class StartsFirst(CandidateSampler):
    """Baselines first, then another source.

    Args:
        repair: brings candidates into the budget.
        then: what follows.
    """

    def __init__(self, repair: Repair, then: CandidateSampler) -> None:
        self._starts = list(starts(repair).items())
        self._then = then

    @override
    def propose(self, asked: Asked) -> Proposal:
        place = next_of([start for _, start in self._starts], asked.candidates)
        if place is None:
            return self._then.propose(asked)
        self._then.adopt(asked)
        name, candidate = self._starts[place]
        return Proposal(candidate=candidate, kind=name, fill=False)

    @override
    def adopt(self, asked: Asked) -> None:
        self._then.adopt(asked)

    @override
    def before(self, study: Study, trial: FrozenTrial) -> None:
        self._then.before(study, trial)

    @override
    def after(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._then.after(study, trial, state, values)


class UniformOnly(CandidateSampler):
    """The baseline of equal shares, and nothing else."""

    count = 1

    def __init__(self, repair: Repair) -> None:
        self._candidate = uniform(repair)

    @override
    def propose(self, asked: Asked) -> Proposal:
        return Proposal(candidate=self._candidate, kind="uniform")


class Grid(CandidateSampler):
    """Every combination within the limits once, those that use the budget first.

    Args:
        repair: brings candidates into the budget.
        fill: whether candidates are brought up to the budget; None takes those that are, and then
            those that leave some of it.
    """

    def __init__(self, repair: Repair, *, fill: bool | None) -> None:
        if repair.space.size > MOST_IN_GRID:
            raise ConfigError(
                f"sampler grid: the space has {repair.space.size:,} combinations, and a grid takes "
                f"{MOST_IN_GRID:,} at most; tie tables, shorten lists, or take another sampler"
            )
        ranges = [range(len(unit.options)) for unit in repair.space.units]
        every = list(itertools.product(*ranges))
        found = [repair(candidate, fill=True) for candidate in every if fill is not False]
        found += [repair(candidate, fill=False) for candidate in every if fill is not True]
        self._candidates = list(dict.fromkeys(found))
        self.count = len(self._candidates)

    @override
    def propose(self, asked: Asked) -> Proposal:
        place = next_of(self._candidates, asked.candidates) or 0
        return Proposal(candidate=self._candidates[place], kind="grid", fill=False)
