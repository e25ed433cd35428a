"""Brings any candidate inside the budget and up to it; no candidate is ever rejected.

A proposal says how its tables should stand to each other. All of them are scaled by one factor (a
table of importance 2 by its square root) to what the budget holds, each in the options that differ
from its own in size only; of the tables that change at the last step, those that save most bytes
for their importance give way. What is left of the budget is handed out in single steps, fewest
bytes for their importance first. Where those cannot use the budget, because few large tables share
it, the closest sum is found exactly. A proposal that is inside the limits and uses the budget is
left as it is.

Everything is a function of the proposal and the space: ties go to the earlier table.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

from embcomp.errors import BudgetError
from embcomp.planning.placement import PlacementError
from embcomp.search.space.costs import Costs
from embcomp.search.space.device_limits import PlacementChecker
from embcomp.search.space.space import Candidate, Space
from embcomp.tables.budget import format_bytes

USED = 0.98
"""The share of the budget that candidates use, where the options allow it."""

_RESOLUTION = 1 << 14  # steps into which the exact fill divides the budget
_SUMS = 64  # sums near the budget whose candidates are compared
_SCALES = 48  # halvings of the search for the common factor
_WIDEST = 40.0  # log of the largest factor: more than any two options differ by


class Repair:
    """Maps proposals to candidates inside the limits.

    Args:
        space: the space.
        costs: bytes of its candidates.
        devices: what the devices hold.
        budget: serving bytes.
        importance: how reluctantly a unit gives way, by name; 1 for the others.

    Raises:
        BudgetError: when no candidate is within the budget; the text names the floor and the
            table that sets it.
        PlacementError: when none fits the devices.
    """

    def __init__(
        self,
        space: Space,
        costs: Costs,
        devices: PlacementChecker,
        budget: int,
        importance: Mapping[str, float] | None = None,
    ) -> None:
        self.space, self.costs, self.devices, self.budget = space, costs, devices, budget
        given = importance or {}
        self.importance = tuple(given.get(unit.name, 1.0) for unit in space.units)
        self.floor = self._find_floor()
        if not devices.fits(self.floor):
            lightest = self._lightest()
            if costs.of(lightest).serve > budget or not devices.fits(lightest):
                raise PlacementError(self._too_large_to_train(lightest))
            self.floor = lightest

    @cached_property
    def reachable(self) -> tuple[int, int]:
        """Serving bytes of the smallest and the largest candidate, whatever the budget."""
        largest = tuple(len(unit.options) - 1 for unit in self.space.units)
        return self.costs.of(self.smallest).serve, self.costs.of(largest).serve

    def __call__(
        self, proposal: Candidate, *, fill: bool = True, keep_methods: bool = False
    ) -> Candidate:
        """The candidate that a proposal stands for.

        Args:
            proposal: any candidate of the space.
            fill: whether to use the budget up; else only what is over it changes.
            keep_methods: whether filling leaves every unit the method that it has, though less of
                the budget is used then.
        """
        limit = self.devices.most_train
        lines = () if not fill else (True,) if keep_methods else (True, False)
        while True:
            candidate = self._within(proposal, limit, lines)
            if self.devices.fits(candidate):
                return candidate
            if candidate == self.floor:
                return self.floor
            # Less of everything; a hundredth at a time, so that little is given up in vain.
            limit = int(self.costs.of(candidate).train * 0.99)
            if limit <= self.costs.of(self.floor).train:
                return self.floor

    def _within(self, proposal: Candidate, limit: int | None, lines: tuple[bool, ...]) -> Candidate:
        """Inside the serving budget and a limit on training bytes.

        Args:
            proposal: any candidate.
            limit: training bytes; None when not limited.
            lines: the ways to fill, in turn: within the options' lines (True), or over all options.
        """
        fill = bool(lines)

        def fits(candidate: Candidate) -> bool:
            cost = self.costs.of(candidate)
            return cost.serve <= self.budget and (limit is None or cost.train <= limit)

        if fits(proposal) and (not fill or self._uses_budget(proposal)):
            return proposal
        candidate = self._scaled(proposal, fits, grow=fill)
        if not fits(candidate):
            candidate = self._step_down(candidate, fits)
        for whole_line in lines:
            if not self._uses_budget(candidate):
                candidate = self._step_up(candidate, fits, whole_line)
            if not self._uses_budget(candidate):
                candidate = self._closest_sum(candidate, fits, whole_line)
        return candidate

    def _uses_budget(self, candidate: Candidate) -> bool:
        return self.costs.of(candidate).serve >= USED * self.budget

    def _scaled(
        self, proposal: Candidate, fits: Callable[[Candidate], bool], *, grow: bool
    ) -> Candidate:
        """All units times the largest common factor that fits, and some at the next larger one.

        Options are steps, so that many units change at one factor. Just beyond the largest one
        that fits, those that would be too much step back, most bytes for their importance first.
        """
        below, above = -_WIDEST, _WIDEST if grow else 0.0
        low, high = self._times(proposal, below), self._times(proposal, above)
        if fits(high):
            return high
        for _ in range(_SCALES):
            middle = (below + above) / 2
            candidate = self._times(proposal, middle)
            if fits(candidate):
                below, low = middle, candidate
            else:
                above, high = middle, candidate
        order = [
            (-self._saved(u, high[u], low[u]) / self.importance[u], u)
            for u in range(len(low))
            if high[u] != low[u]
        ]
        now = list(high)
        for _, u in sorted(order):
            now[u] = low[u]
            if fits(tuple(now)):
                break
        return tuple(now)

    def _saved(self, u: int, place: int, lower: int) -> int:
        options = self.space.units[u].options
        return options[place].bytes - options[lower].bytes

    def _times(self, proposal: Candidate, log_factor: float) -> Candidate:
        """Each unit's largest option of its line within its proposed bytes times a factor."""
        chosen = []
        for u, place in enumerate(proposal):
            places, sizes = self._lines[u][place]
            share = math.exp(log_factor / self.importance[u])
            allowed = self.space.units[u].options[place].bytes * share
            chosen.append(places[max(0, bisect.bisect_right(sizes, allowed * (1 + 1e-9)) - 1)])
        return tuple(chosen)

    @cached_property
    def _lines(self) -> list[list[tuple[tuple[int, ...], list[int]]]]:
        return [
            [(line, [unit.options[i].bytes for i in line]) for line in unit.line_of]
            for unit in self.space.units
        ]

    def _step_down(self, candidate: Candidate, fits: Callable[[Candidate], bool]) -> Candidate:
        """Single steps towards fewer bytes until it fits; the floor if nothing else does."""
        now = list(candidate)
        heap = [entry for u in range(len(now)) for entry in self._down(u, now[u])]
        heapq.heapify(heap)
        while heap:
            _, u, place = heapq.heappop(heap)
            now[u] = place
            if fits(tuple(now)):
                return tuple(now)
            for entry in self._down(u, place):
                heapq.heappush(heap, entry)
        return self.floor

    def _down(self, u: int, place: int) -> Iterator[tuple[float, int, int]]:
        """The next smaller option: of the line, or where the line ends, of all."""
        line = [i for i in self._lines[u][place][0] if i < place]
        lower = line[-1] if line else place - 1
        if lower >= 0:
            yield -self._saved(u, place, lower) / self.importance[u], u, lower

    def _step_up(
        self, candidate: Candidate, fits: Callable[[Candidate], bool], whole_line: bool
    ) -> Candidate:
        """Hand out what is left, fewest bytes for the importance first, until it is used."""
        now = list(candidate)
        heap = [entry for u in range(len(now)) for entry in self._up(u, now[u], whole_line)]
        heapq.heapify(heap)
        while heap and not self._uses_budget(tuple(now)):
            _, u, place = heapq.heappop(heap)
            old = now[u]
            now[u] = place
            if not fits(tuple(now)):
                now[u] = old
                continue
            for entry in self._up(u, place, whole_line):
                heapq.heappush(heap, entry)
        return tuple(now)

    def _allowed(self, u: int, place: int, whole_line: bool) -> Sequence[int]:
        return self._lines[u][place][0] if whole_line else range(len(self.space.units[u].options))

    def _up(self, u: int, place: int, whole_line: bool) -> Iterator[tuple[float, int, int]]:
        """The next larger option: of the line, or of all."""
        higher = [i for i in self._allowed(u, place, whole_line) if i > place]
        if higher:
            yield self._saved(u, higher[0], place) / self.importance[u], u, higher[0]

    def _closest_sum(
        self, candidate: Candidate, fits: Callable[[Candidate], bool], whole_line: bool
    ) -> Candidate:
        """The candidate nearest to this one of those that use the budget.

        Sums of bytes in steps of a 16,384th of the budget, rounded up so that none exceeds it, are
        bits of one integer per unit. Where units share storage, sums mean nothing and the
        candidate stays.
        """
        if not self.costs.additive:
            return candidate
        grain = max(1, self.budget // _RESOLUTION)
        limit = self.budget // grain
        mask = (1 << (limit + 1)) - 1
        steps = [
            {
                o: -(-self.costs.of_option(u, o).serve // grain)
                for o in self._allowed(u, place, whole_line)
            }
            for u, place in enumerate(candidate)
        ]
        reached = [1]
        for sizes in steps:
            after = 0
            for size in set(sizes.values()):
                after |= reached[-1] << size & mask if size <= limit else 0
            reached.append(after)
        low = min(limit, math.ceil(limit * USED) + len(steps))  # each unit is rounded by a step
        best = self._nearest(candidate, steps, reached, low, limit)
        if best is None or self.costs.of(best).serve <= self.costs.of(candidate).serve:
            return candidate
        return best if fits(best) else candidate

    def _nearest(
        self,
        candidate: Candidate,
        steps: list[dict[int, int]],
        reached: list[int],
        low: int,
        high: int,
    ) -> Candidate | None:
        """Of the sums in a window, or the largest below it, the one with the fewest changes."""
        sums = [s for s in range(high, low - 1, -1) if reached[-1] >> s & 1][:_SUMS]
        if not sums:
            below = reached[-1] & (1 << low) - 1
            if not below:
                return None
            sums = [below.bit_length() - 1]
        found = [_backtrack(candidate, steps, reached, total) for total in sums]
        return min(found, key=lambda other: (_distance(candidate, other), other))

    @cached_property
    def smallest(self) -> Candidate:
        """The candidate of the fewest serving bytes that is found."""
        tried = [tuple(0 for _ in self.space.units)]
        if not self.costs.additive:
            # A table that joins shared storage may cost nothing, though by itself it costs much.
            lines = {option.family for unit in self.space.units for option in unit.options}
            for line in sorted(lines, key=repr):
                tried.append(
                    tuple(
                        next((i for i, o in enumerate(unit.options) if o.family == line), 0)
                        for unit in self.space.units
                    )
                )
        return min(tried, key=lambda candidate: (self.costs.of(candidate).serve, candidate))

    def _lightest(self) -> Candidate:
        """Each unit at its fewest training bytes."""
        return tuple(
            min((self.costs.of_option(u, o).train, o) for o in range(len(unit.options)))[1]
            for u, unit in enumerate(self.space.units)
        )

    def _find_floor(self) -> Candidate:
        smallest = self.smallest
        size = self.costs.of(smallest).serve
        if size <= self.budget:
            return smallest
        alone = [self.costs.of_option(u, o).serve for u, o in enumerate(smallest)]
        largest = max(range(len(alone)), key=lambda u: (alone[u], -u))
        unit = self.space.units[largest]
        raise BudgetError(
            f"budget: no candidate of the space is within {self.budget:,} bytes; the smallest "
            f"takes {size:,} bytes ({format_bytes(size)}), of which {alone[largest]:,} are for "
            f"{unit.name!r} as {unit.options[smallest[largest]].label!r}, its smallest choice. "
            "Raise the budget or give that table smaller choices"
        )

    def _too_large_to_train(self, candidate: Candidate) -> str:
        alone = [self.costs.of_option(u, o).train for u, o in enumerate(candidate)]
        largest = max(range(len(alone)), key=lambda u: (alone[u], -u))
        limits = self.devices.limits
        if limits.query is None:
            holds = f"{limits.train or 0:,} bytes of one device"
        else:
            free = limits.query.device_memory - limits.query.reserved
            holds = f"{limits.query.world_size} x {free:,} bytes of device memory"
        return (
            f"no candidate of the space can be trained on {holds}: the lightest takes "
            f"{self.costs.of(candidate).train:,} bytes of rows and optimizer state, of which "
            f"{alone[largest]:,} are for {self.space.units[largest].name!r}. More devices, a "
            "lighter row optimizer, or smaller choices for that table"
        )


def _backtrack(
    candidate: Candidate, steps: list[dict[int, int]], reached: list[int], left: int
) -> Candidate:
    """Options that add up to a sum, the last unit's first, each as near as may be."""
    chosen = list(candidate)
    for u in range(len(steps) - 1, -1, -1):
        chosen[u] = min(
            (abs(o - candidate[u]), o)
            for o, size in steps[u].items()
            if size <= left and reached[u] >> left - size & 1
        )[1]
        left -= steps[u][chosen[u]]
    return tuple(chosen)


def _distance(one: Candidate, other: Candidate) -> int:
    return sum(abs(a - b) for a, b in zip(one, other))
