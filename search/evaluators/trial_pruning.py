"""When a candidate is stopped early: Optuna's pruners for one objective, our own rule for several.

Several objectives: at a rung, candidates are ranked by fronts, each front being what only better
fronts beat in both the metric so far and the bytes. One in `reduction` goes on, and whatever no
other candidate at the rung beats goes on in any case.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner

from embcomp.search.config.search_sections import RungsConfig

Point = tuple[float, ...]
"""Values of which less is better in each."""


def rung_steps(rungs: RungsConfig | None, steps: int) -> list[int]:
    """The rungs below the last step."""
    found: list[int] = []
    step = rungs.min_steps if rungs else steps
    while rungs and step < steps:
        found.append(step)
        step *= rungs.reduction
    return found


def make_pruner(rungs: RungsConfig | None, steps: int, objectives: int) -> BasePruner:
    """Optuna's pruner for one objective; none otherwise."""
    if rungs is None or objectives > 1:
        return NopPruner()
    if rungs.kind == "hyperband":
        return HyperbandPruner(
            min_resource=rungs.min_steps, max_resource=steps, reduction_factor=rungs.reduction
        )
    return SuccessiveHalvingPruner(
        min_resource=rungs.min_steps, reduction_factor=rungs.reduction, min_early_stopping_rate=0
    )


def falls_behind(point: Point, peers: Sequence[Point], reduction: int) -> bool:
    """Whether a candidate is stopped at a rung.

    Args:
        point: its metric (less is better) and its costs.
        peers: those of the other candidates that reached the rung.
        reduction: one in so many goes on.
    """
    together = [*peers, point]
    if len(together) < reduction:
        return False
    ahead = front_of(together)
    mine = ahead[-1]
    better = sum(1 for front in ahead[:-1] if front < mine)
    return mine > 0 and better >= len(together) / reduction


def front_of(points: Sequence[Point]) -> list[int]:
    """For each point, how many fronts are better; 0 for those that nothing beats."""
    fronts = [-1] * len(points)
    left, number = set(range(len(points))), 0
    while left:
        best = {i for i in left if not any(beats(points[j], points[i]) for j in left)}
        for i in best:
            fronts[i] = number
        left, number = left - best, number + 1
    return fronts


def beats(one: Point, other: Point) -> bool:
    """Whether no value is worse, and one is better."""
    return all(a <= b for a, b in zip(one, other)) and one != other
