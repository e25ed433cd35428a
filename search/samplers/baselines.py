"""Candidates that need no search: equal shares, and shares that follow a power of the rows.

Power laws are the rule of Ginart et al., "Mixed Dimension Embeddings with Application to
Memory-Efficient Recommendation Systems", 2019, https://arxiv.org/abs/1909.11810: a table of n rows
is given width in proportion to `n ** -a`.
"""

from __future__ import annotations

from embcomp.search.space.options import Unit
from embcomp.search.space.repair import Repair
from embcomp.search.space.space import Candidate

POWERS = (0.1, 0.2, 0.3, 0.5)


def uniform(repair: Repair) -> Candidate:
    """The same share of its full bytes for every unit, as large as the budget allows.

    What a coarse grid leaves of the budget is dealt out in single steps in the tables' own order,
    so that the baseline is compared at equal bytes and still knows nothing of the tables.
    """
    now = list(_largest(repair, 0.0))
    again = True
    while again:
        again = False
        for u, unit in enumerate(repair.space.units):
            higher = [i for i in unit.line_of[now[u]] if i > now[u]]
            if not higher:
                continue
            old, now[u] = now[u], higher[0]
            if repair.costs.of(tuple(now)).serve <= repair.budget:
                again = True
            else:
                now[u] = old
    return repair(tuple(now))


def power_law(repair: Repair, power: float) -> Candidate:
    """Share in proportion to `rows ** -power`, as large as the budget allows."""
    return repair(_largest(repair, power))


def _largest(repair: Repair, power: float) -> Candidate:
    units = repair.space.units
    fewest = min(unit.rows for unit in units)
    best = repair.floor
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        candidate = tuple(
            _at_most(unit, unit.full_bytes * 2.0**middle * (fewest / unit.rows) ** power)
            for unit in units
        )
        if repair.costs.of(candidate).serve <= repair.budget:
            low, best = middle, candidate
        else:
            high = middle
    return best


def starts(repair: Repair) -> dict[str, Candidate]:
    """What a search tries first, by name: equal shares, then power laws, each once."""
    found = {"uniform": uniform(repair)}
    for power in POWERS:
        candidate = power_law(repair, power)
        if candidate not in found.values():
            found[f"rows ** -{power}"] = candidate
    return found


def _at_most(unit: Unit, allowed: float) -> int:
    """The largest option within some bytes, of the first method named and the full table."""
    places = unit.line_of[_first(unit)]
    fitting = [i for i in places if unit.options[i].bytes <= allowed * (1 + 1e-9)]
    return fitting[-1] if fitting else places[0]


def _first(unit: Unit) -> int:
    return next(iter(unit.variants[0].option_at.values())) if unit.variants else 0
