"""Which cells get another seed when hours are short: what separates methods, not what is lost already.

Successive halving over seeds (Jamieson and Talwalkar, AISTATS 2016) with a safeguard: of the methods at
one budget the better half goes on, and of the others what cannot be told from the last of that half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcomp.benchmark.benchmark_config import REFERENCES
from embcomp.benchmark.cells import Cell
from embcomp.benchmark.significance import PairedDifference, paired_difference


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a cell stands after some seeds.

    Args:
        cell: the cell.
        aucs: test AUC by seed.
        draws: (B,) AUCs of drawn rows by seed; empty where the scores are not at hand.
        seconds: mean time of a final run.
    """

    cell: Cell
    aucs: Mapping[int, float]
    seconds: float
    draws: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean test AUC; below any where all runs failed."""
        return sum(self.aucs.values()) / len(self.aucs) if self.aucs else -1.0

    @property
    def is_reference(self) -> bool:
        """Whether others are compared with it, so that it is always trained on."""
        return self.cell.method in REFERENCES


def difference(ours: Standing, theirs: Standing, *, seed: int) -> PairedDifference | None:
    """One cell against another on the seeds of both; None where scores are missing."""
    return paired_difference(ours.aucs, theirs.aucs, ours.draws, theirs.draws, seed=seed)


def going_on(
    standings: Sequence[Standing], *, seconds_left: float, seed: int
) -> tuple[list[Cell], list[Cell]]:
    """The cells that get another seed, and the certain losers.

    Args:
        standings: of all cells that still take part.
        seconds_left: training time that is left; what does not fit goes, the worst of its group first.
        seed: of the draws of seeds.

    Returns:
        Cells that go on, empty where time is up, and those that are certainly behind.
    """
    losers: list[Cell] = []
    places: list[tuple[float, Standing]] = []
    for group in _groups(standings):
        ranked = sorted(group, key=lambda each: -each.mean)
        last = ranked[(len(ranked) - 1) // 2]
        for place, one in enumerate(ranked):
            if _is_lost(one, last, place > ranked.index(last), seed):
                losers.append(one.cell)
            else:
                places.append((place / len(ranked), one))
    places.sort(key=lambda item: (not item[1].is_reference, item[0]))
    kept: list[Standing] = []
    for _, one in places:
        if sum(each.seconds for each in kept) + one.seconds > seconds_left:
            break
        kept.append(one)
    others = [one for _, one in places if not one.is_reference]
    if others and not any(one in kept for one in others):
        return [], losers  # references alone separate nothing
    cells = [one.cell for one in kept]
    return [one.cell for one in standings if one.cell in cells], losers


def _is_lost(one: Standing, last: Standing, is_behind: bool, seed: int) -> bool:
    if one.is_reference or not is_behind:
        return False
    if not one.aucs:
        return True
    lead = difference(last, one, seed=seed)
    return lead is not None and lead.is_better


def _groups(standings: Sequence[Standing]) -> list[list[Standing]]:
    found: dict[Any, list[Standing]] = {}
    for one in standings:
        found.setdefault((one.cell.model, one.cell.budget), []).append(one)
    return list(found.values())
