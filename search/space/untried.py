"""What is left to try: the next candidate when proposals lead to none that is new.

Filling brings many proposals to few candidates, so a search of more trials than those goes on with
candidates that leave part of the budget unused, most bytes first. None within the limits is out of
reach, whatever proposes.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Iterator
from functools import cached_property

from embcomp.search.space.repair import USED, Repair
from embcomp.search.space.space import Candidate

MOST_LISTED = 10_000
"""Candidates of a space up to which all of them are listed."""

Key = tuple[float, float, Candidate]


class Untried:
    """Finds candidates within the limits that were not tried.

    Args:
        repair: the limits.
        fill: whether those that use the budget come before those that are near.
    """

    def __init__(self, repair: Repair, *, fill: bool) -> None:
        self._repair, self._fill = repair, fill

    @property
    def lists_all(self) -> bool:
        """Whether nothing found means that nothing is left; else only that none is near."""
        return self._repair.space.size <= MOST_LISTED

    def next(self, candidate: Candidate, taken: Collection[Candidate]) -> Candidate | None:
        """The first that is not taken, or None.

        Args:
            candidate: one within the limits, near which to look.
            taken: those that were tried.
        """
        if self.lists_all:
            left = (other for other in self._within_budget if other not in taken)
            ordered: Iterator[Candidate] = iter(sorted(left, key=self._key(candidate)))
        else:
            ordered = (other for other in self._walk(candidate) if other not in taken)
        return next((other for other in ordered if self._repair.devices.fits(other)), None)

    @cached_property
    def _within_budget(self) -> list[Candidate]:
        ranges = [range(len(unit.options)) for unit in self._repair.space.units]
        return [each for each in itertools.product(*ranges) if self._is_within_budget(each)]

    def _is_within_budget(self, candidate: Candidate) -> bool:
        return self._repair.costs.of(candidate).serve <= self._repair.budget

    def _key(self, near: Candidate) -> Callable[[Candidate], Key]:
        """What comes first: the budget used, as far as that counts, or a small distance."""
        enough = USED * self._repair.budget

        def key(candidate: Candidate) -> Key:
            size = self._repair.costs.of(candidate).serve
            steps = sum(abs(a - b) for a, b in zip(candidate, near))
            return (
                (-min(size, enough), steps, candidate) if self._fill else (steps, -size, candidate)
            )

        return key

    def _walk(self, start: Candidate) -> Iterator[Candidate]:
        """All that single steps within the limits lead to, the first of those at hand each time."""
        key, seen = self._key(start), {start}
        heap = [key(start)]
        while heap:
            here = heapq.heappop(heap)[-1]
            yield here
            if not self._repair.devices.fits(here):
                continue
            for u, unit in enumerate(self._repair.space.units):
                for place in (here[u] - 1, here[u] + 1):
                    other = (*here[:u], place, *here[u + 1 :])
                    known = other in seen or not 0 <= place < len(unit.options)
                    if not known and self._is_within_budget(other):
                        seen.add(other)
                        heapq.heappush(heap, key(other))
