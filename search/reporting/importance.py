"""How much of the difference between candidates each choice explains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence


def importances(
    choices: Sequence[Mapping[str, Hashable]], scores: Sequence[float]
) -> dict[str, float]:
    """The share of the scores' variance between the options of each choice, highest first.

    It is epsilon squared, the correlation ratio freed of what as many options would explain by
    chance, and zero when that is negative. Choices of repaired candidates depend on each other, so
    shares need not add up to one.

    Args:
        choices: the option of each choice, for each candidate.
        scores: the metric of each candidate.
    """
    count = len(scores)
    mean = sum(scores) / count if count else 0.0
    total = sum((score - mean) ** 2 for score in scores)
    names = list(choices[0]) if choices else []
    found = {name: _share([c[name] for c in choices], scores, total) for name in names}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _share(options: Sequence[Hashable], scores: Sequence[float], total: float) -> float:
    groups = defaultdict(list)
    for option, score in zip(options, scores):
        groups[option].append(score)
    count, kinds = len(scores), len(groups)
    if kinds < 2 or kinds >= count or total <= 0:
        return 0.0
    within = 0.0
    for group in groups.values():
        mean = sum(group) / len(group)
        within += sum((score - mean) ** 2 for score in group)
    return max(0.0, 1 - (within / (count - kinds)) / (total / (count - 1)))
