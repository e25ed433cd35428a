"""Candidates to look at before anything is trained."""

from __future__ import annotations

import random

from embcomp.search.api import Prepared
from embcomp.search.samplers.baselines import starts
from embcomp.search.space.space import Candidate


def example_candidates(prepared: Prepared, count: int) -> dict[str, Candidate]:
    """The equal share, another start, then random proposals after repair, by name."""
    found: dict[str, Candidate] = {}
    for name, candidate in list(starts(prepared.repair).items())[:2]:
        found[name] = candidate
    draw = random.Random(prepared.config.seed)
    for attempt in range(1, 20 * count):
        if len(found) >= count:
            break
        proposal = tuple(draw.randrange(len(unit.options)) for unit in prepared.space.units)
        candidate = prepared.repair(proposal, fill=prepared.config.fills)
        if candidate not in found.values():
            found[f"random {attempt}"] = candidate
    return found
