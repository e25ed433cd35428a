"""The baseline that a search must beat: what each table alone is worth, then a knapsack.

The equal share is trained once, and once more for every table with that table alone at its
smallest. The metric that is lost, spread over the halvings between the two, says what a doubling of
that table is worth; the knapsack then buys doublings in the order of worth per byte. Every trained
candidate is within the budget, probes included, so the method works where full tables fit nowhere.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

from typing_extensions import override

from embcomp.search.attempts import next_of
from embcomp.search.samplers.base import Asked, CandidateSampler, Proposal, Tried
from embcomp.search.samplers.baselines import uniform
from embcomp.search.space.repair import Repair
from embcomp.search.space.space import Candidate

_WORTH_PROBING = 1 / 500  # share of the budget below which a table may as well be large


class Greedy(CandidateSampler):
    """Probes, then the knapsack.

    Args:
        repair: brings candidates into the budget.
    """

    def __init__(self, repair: Repair) -> None:
        self._repair = repair
        self._base = uniform(repair)
        units = repair.space.units
        self._probed = [
            u
            for u, unit in enumerate(units)
            if smallest_of_line(repair, self._base, u) < self._base[u]
            and unit.options[-1].bytes >= repair.budget * _WORTH_PROBING
        ]
        # The equal share, and then one probe for each of these tables.
        self._measured = [self._base, *(self._probe(u) for u in self._probed)]
        self.count = len(self._measured) + 1

    def _probe(self, u: int) -> Candidate:
        probe = list(self._base)
        probe[u] = smallest_of_line(self._repair, self._base, u)
        return self._repair(tuple(probe), fill=False)

    @override
    def ready(self, rank: int, tried: Sequence[Tried]) -> bool:
        if next_of(self._measured, [one.candidate for one in tried]) is not None:
            return True
        return not any(one.running for one in tried)

    @override
    def propose(self, asked: Asked) -> Proposal:
        place = next_of(self._measured, asked.candidates)
        if place is not None:
            unit = self._repair.space.units[self._probed[place - 1]] if place else None
            kind = f"probe of {unit.name}" if unit else "uniform"
            return Proposal(candidate=self._measured[place], kind=kind, fill=False)
        worth = self._worth({one.candidate: one.quality for one in asked.tried})
        return Proposal(candidate=self._knapsack(worth), kind="greedy")

    def _worth(self, quality: Mapping[Candidate, float | None]) -> list[float]:
        """What a doubling of each unit's bytes is worth; infinite where it is not known."""
        base = quality.get(self._base)
        worth = [math.inf] * len(self._base)
        for u, measured in zip(self._probed, self._measured[1:]):
            probe = quality.get(measured)
            if base is None or probe is None:
                worth[u] = 1.0  # nothing measured: all alike
                continue
            options = self._repair.space.units[u].options
            small = smallest_of_line(self._repair, self._base, u)
            halvings = math.log2(options[self._base[u]].bytes / max(1, options[small].bytes))
            worth[u] = max(base - probe, 0.0) / halvings
        known = [value for value in worth if 0 < value < math.inf]
        least = min(known, default=1.0) / 10  # no loss measured is not no worth
        return [max(value, least) for value in worth]

    def _knapsack(self, worth: Sequence[float]) -> Candidate:
        repair = self._repair
        now = [smallest_of_line(repair, self._base, u) for u in range(len(self._base))]
        if repair.costs.of(tuple(now)).serve > repair.budget:
            now = list(repair.floor)
        heap = [step for u in range(len(now)) for step in self._step(u, now[u], worth)]
        heapq.heapify(heap)
        while heap:
            _, u, place = heapq.heappop(heap)
            old, now[u] = now[u], place
            if repair.costs.of(tuple(now)).serve > repair.budget:
                now[u] = old
                continue
            for step in self._step(u, place, worth):
                heapq.heappush(heap, step)
        return tuple(now)

    def _step(self, u: int, place: int, worth: Sequence[float]) -> list[tuple[float, int, int]]:
        options = self._repair.space.units[u].options
        higher = [i for i in self._repair.space.units[u].line_of[place] if i > place]
        if not higher:
            return []
        small, large = options[place].bytes, options[higher[0]].bytes
        gain = worth[u] * math.log2(large / max(1, small))
        per_byte = gain / max(1, large - small)
        return [(-per_byte, u, higher[0])]


def smallest_of_line(repair: Repair, candidate: Candidate, u: int) -> int:
    """The smallest option of a unit that differs from the chosen one in size only."""
    return repair.space.units[u].line_of[candidate[u]][0]
