"""Evolution as a source of candidates: children of the best so far, repaired and new.

The operators are those of `embcomp.backends.widths.evolution`, here over the options of any space, whatever scores
the candidates. A child is bred from what was scored when it is asked for, and drawn from the
search's seed and its own rank: there are no generations to wait for, nothing is kept outside of the
study, and a search that was killed goes on as it would have.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from typing_extensions import override

from embcomp.backends.widths.evolution import Evolution, cross, mutate
from embcomp.backends.widths.width_space import WidthSpace
from embcomp.search.samplers.base import Asked, CandidateSampler, Proposal, Tried
from embcomp.search.space.repair import Repair
from embcomp.search.space.space import Candidate

_ATTEMPTS = 50  # at a child that is new


class EvolutionSource(CandidateSampler):
    """Random candidates first, then children of the best by mutation or crossover.

    Args:
        repair: brings candidates into the limits.
        fill: whether they are brought up to the budget.
        population: candidates that it begins with, starts included.
        seed: the search's.
        settings: how many parents there are, how they are changed, and how often.
    """

    def __init__(
        self,
        repair: Repair,
        *,
        fill: bool,
        population: int,
        seed: int,
        settings: Evolution | None = None,
    ) -> None:
        units = repair.space.units
        self._repair, self._fill, self._seed = repair, fill, seed
        self._population, self._settings = population, settings or Evolution()
        # Fields are units and widths are places of options, which ascend by bytes.
        self._space = WidthSpace(
            names=tuple(unit.name for unit in units),
            choices=tuple(tuple(range(len(unit.options))) for unit in units),
            sizes=tuple(tuple(option.bytes for option in unit.options) for unit in units),
            rows=tuple(unit.rows for unit in units),
        )

    @override
    def propose(self, asked: Asked) -> Proposal:
        draw = random.Random(f"evolution/{self._seed}/{asked.rank}")
        parents = self._parents(asked.tried) if asked.rank >= self._population else []
        known = {one.candidate for one in asked.tried}
        for _ in range(_ATTEMPTS):
            child, kind = self._child(parents, draw)
            found = self._repair(child, fill=self._fill)
            if found not in known:
                break
        return Proposal(candidate=found, kind=kind, fill=False)

    def _parents(self, tried: Sequence[Tried]) -> list[Candidate]:
        """The best so far; equals by bytes, then by options."""
        size = self._repair.costs.of
        scored = [
            (-one.quality, size(one.candidate).serve, one.candidate)
            for one in tried
            if one.quality is not None
        ]
        return [candidate for _, _, candidate in sorted(scored)[: self._settings.parents]]

    def _child(self, parents: Sequence[Candidate], draw: random.Random) -> tuple[Candidate, str]:
        settings = self._settings
        if not parents:
            return self._space.random_candidate(draw), "random"
        share = settings.crossovers / max(1, settings.crossovers + settings.mutants)
        if len(parents) > 1 and len(parents[0]) > 1 and draw.random() < share:
            one, other = draw.sample(parents, 2)
            return cross(one, other, draw), "crossover"
        parent = draw.choice(parents)
        return mutate(self._space, parent, settings.mutation_probability, draw), "mutation"
