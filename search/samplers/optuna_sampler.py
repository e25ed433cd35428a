"""Optuna's samplers as sources, and the sampler through which a study sees repaired candidates.

Samplers learn from what was tried. So repair happens inside the study's sampler, between Optuna's
proposal and the trial that it becomes: the parameters on record are those of the candidate that was
trained. Every proposal has a sampler of its own, seeded by the search's seed and the candidate's
rank; what a sampler remembers it keeps in the study. So workers do not repeat each other, and a
search that is killed goes on as it would have.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState
from typing_extensions import override

from embcomp.search.attempts import (
    RETRY_OF,
    latest_attempts,
    originals,
    sign_proposal,
    wait_for_earlier,
)
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.samplers.base import (
    Asked,
    CandidateSampler,
    Grid,
    Proposal,
    StartsFirst,
    Tried,
    UniformOnly,
)
from embcomp.search.samplers.bounded_tpe import FewTrialsTPE
from embcomp.search.samplers.candidate_encoding import Encoding
from embcomp.search.samplers.derived_cma import DerivedCma
from embcomp.search.samplers.evolution_sampler import EvolutionSource
from embcomp.search.samplers.gradient import Gradient
from embcomp.search.samplers.greedy_sampler import Greedy
from embcomp.search.space.repair import Repair
from embcomp.search.space.space import Candidate
from embcomp.search.space.untried import Untried

_ATTEMPTS = 64  # changes of a candidate that was tried before, until what is left is looked through


class OptunaSource(CandidateSampler):
    """Asks one of Optuna's samplers.

    Args:
        name: for people.
        make: a sampler for a seed.
        encoding: the study's parameters.
        seed: the search's.
    """

    def __init__(
        self, name: str, make: Callable[[int], BaseSampler], encoding: Encoding, seed: int
    ) -> None:
        self._name, self._make, self._encoding, self._seed = name, make, encoding, seed
        self._running: dict[int, BaseSampler] = {}

    @override
    def propose(self, asked: Asked) -> Proposal:
        sampler = self._sampler(asked.study, asked.trial)
        space = dict(self._encoding.distributions)
        parameters = dict(sampler.sample_relative(asked.study, asked.trial, space))
        for name, distribution in space.items():
            if name not in parameters:
                parameters[name] = sampler.sample_independent(
                    asked.study, asked.trial, name, distribution
                )
        candidate = self._encoding.decode(parameters)
        return Proposal(candidate=candidate, kind=self._name, parameters=parameters)

    @override
    def adopt(self, asked: Asked) -> None:
        # What is drawn is thrown away; the sampler notes that the trial is one of its own.
        space = dict(self._encoding.distributions)
        self._sampler(asked.study, asked.trial).sample_relative(asked.study, asked.trial, space)

    @override
    def before(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler(study, trial).before_trial(study, trial)

    @override
    def after(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._sampler(study, trial).after_trial(study, trial, state, values)
        self._running.pop(trial.number, None)

    def _sampler(self, study: optuna.Study, trial: FrozenTrial) -> BaseSampler:
        if trial.number not in self._running:
            seed = (self._seed * 1_000_003 + rank_of(study, trial)) % 2**32
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._running[trial.number] = self._make(seed)
        return self._running[trial.number]


def rank_of(study: optuna.Study, trial: FrozenTrial) -> int:
    """How many candidates were proposed before; unlike trial numbers, retries do not shift it."""
    return sum(1 for one in originals(study) if one.number < trial.number)


class RepairedSampler(BaseSampler):
    """The study's sampler: proposes, repairs, and never repeats.

    Args:
        source: what proposes.
        encoding: the study's parameters.
        repair: brings candidates into the limits.
        fill: whether candidates are brought up to the budget.
        quality_sign: 1 when more of the metric is better, else -1.
        seed: the search's.
    """

    def __init__(
        self,
        source: CandidateSampler,
        encoding: Encoding,
        repair: Repair,
        *,
        fill: bool,
        quality_sign: int,
        seed: int,
    ) -> None:
        self.source, self.encoding, self.repair = source, encoding, repair
        self._fill, self._sign, self._seed = fill, quality_sign, seed
        self._untried = Untried(repair, fill=fill)
        self._decoded: dict[int, Candidate] = {}
        self.kinds: dict[int, str] = {}
        self.exhausted = False

    @override
    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return dict(self.encoding.distributions)

    @override
    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if RETRY_OF not in trial.user_attrs:
            wait_for_earlier(study, trial, self.encoding.distributions)
        tried = self.tried(study)
        rank = rank_of(study, trial)
        before = [one for one in tried if one.rank < rank]
        asked = Asked(rank=rank, tried=before, study=study, trial=trial)
        if RETRY_OF in trial.user_attrs:  # its parameters were fixed when it was enqueued
            self.source.adopt(asked)
            return {}
        proposal = self.source.propose(asked)
        fill = self._fill if proposal.fill is None else proposal.fill
        candidate = self.repair(proposal.candidate, fill=fill)
        taken = {one.candidate for one in tried if one.rank != rank}
        kind = proposal.kind
        self.exhausted = False
        if candidate in taken and self.source.count is None:
            another = self._another(proposal.candidate, candidate, taken, rank)
            self.exhausted = another is None
            candidate, kind = another or candidate, f"{kind}, changed"
        self.kinds[trial.number] = kind
        return self.encoding.encode(candidate, proposal.parameters)

    @property
    def exhausted_because(self) -> str:
        """Why there is nothing new to propose, for people."""
        size = self.repair.space.size
        if self._untried.lists_all:
            return f"every candidate within the limits was tried, of {size:,} in the space"
        return (
            "no candidate within the limits that was not tried could be found; there may be some "
            f"among the {size:,} of the space"
        )

    @override
    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        raise RuntimeError(f"{param_name} is not a parameter of this search")

    @override
    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        sign_proposal(study, trial)
        self.source.before(study, trial)

    @override
    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self.source.after(study, trial, state, values)

    def tried(self, study: optuna.Study) -> list[Tried]:
        """All candidates whose parameters are known, in the order in which they were proposed."""
        found = []
        for rank, trial in enumerate(latest_attempts(study)):
            candidate = self.candidate(trial)
            if candidate is None:
                continue
            complete = trial.state is TrialState.COMPLETE
            running = trial.state in (TrialState.RUNNING, TrialState.WAITING)
            found.append(
                Tried(
                    rank=rank,
                    candidate=candidate,
                    quality=trial.values[0] * self._sign if complete and trial.values else None,
                    running=running,
                )
            )
        return found

    def candidate(self, trial: FrozenTrial) -> Candidate | None:
        """What a trial trains; None while its parameters are not complete."""
        known = self._decoded.get(trial.number)
        if known is None and set(self.encoding.distributions) <= set(trial.params):
            known = self._decoded[trial.number] = self.encoding.decode(trial.params)
        return known

    def _another(
        self, proposed: Candidate, candidate: Candidate, taken: set[Candidate], rank: int
    ) -> Candidate | None:
        """One that was not tried, near a candidate that was; None when there is none.

        The proposal in its own methods comes first: filling may have led it to another's. Then
        neighbours, the further away, the longer it takes to find one; then whatever is left.
        """
        if self._fill:
            kept = self.repair(proposed, keep_methods=True)
            if kept not in taken:
                return kept
        units = [u for u, unit in enumerate(self.repair.space.units) if len(unit.options) > 1]
        draw = random.Random(f"{self._seed}:{rank}")
        for attempt in range(_ATTEMPTS):
            changed = list(candidate)
            for u in draw.sample(units, min(len(units), 1 + attempt // 8)):
                last = len(self.repair.space.units[u].options) - 1
                changed[u] = min(last, max(0, changed[u] + draw.choice((-2, -1, 1, 2))))
            found = self.repair(tuple(changed), fill=self._fill)
            if found not in taken:
                return found
        return self._untried.next(candidate, taken)


def make_encoding(config: SearchConfig, repair: Repair) -> Encoding:
    """The study's parameters, in the form that the sampler wants."""
    return Encoding(repair.space, relaxed=config.sampler.name == "cmaes")


def make_source(config: SearchConfig, repair: Repair, encoding: Encoding) -> CandidateSampler:
    """What the search's sampler is called."""
    sampler = config.sampler
    if sampler.name == "greedy":
        return Greedy(repair)
    if sampler.name == "uniform":
        return UniformOnly(repair)
    if sampler.name == "gradient":
        return Gradient(repair)
    if sampler.name == "grid":
        return Grid(repair, fill=config.fill if config.fills else False)
    if sampler.name == "evolution":
        evolution = EvolutionSource(
            repair, fill=config.fills, population=sampler.population, seed=config.seed
        )
        return StartsFirst(repair, evolution) if sampler.starts else evolution
    makers: dict[str, Callable[[int], BaseSampler]] = {
        "tpe": lambda seed: FewTrialsTPE(seed, sampler.startup),
        "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=sampler.population),
        "random": lambda seed: RandomSampler(seed=seed),
        "cmaes": lambda seed: DerivedCma(seed, sampler.startup),
    }
    source: CandidateSampler = OptunaSource(
        sampler.name, makers[sampler.name], encoding, config.seed
    )
    return StartsFirst(repair, source) if sampler.starts else source
