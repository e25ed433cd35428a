"""Widths chosen field by field, by what each narrowing costs and the bytes that it saves.

Each field's widths are scored alone, all others at their widest: as many scores as there are widths,
where evolution needs hundreds. It is right where the losses of fields add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from embcomp.backends.widths.evolution import Score, comparable
from embcomp.backends.widths.width_space import Widths, WidthSpace
from embcomp.errors import ConfigError

_EXPONENTS = (0.0, 0.2, 0.5)  # power laws that the outcome is held against


def allocate_greedily(
    space: WidthSpace,
    score: Score,
    *,
    final_score: Score | None = None,
    load: Callable[[], Mapping[str, Any] | None] | None = None,
    save: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[Widths, float, int]:
    """The widths within the budget that lose least, if losses add up.

    Args:
        space: what there is to choose.
        score: of any widths, also beyond the budget; more is better.
        final_score: decides between the outcome and a few power laws; `score` when None.
        load: what `save` was last given; None at the beginning.
        save: keeps JSON values after each score.

    Returns:
        The widths, their final score, and how many candidates were scored.
    """
    known: dict[Widths, float] = {}
    progress = load() if load is not None else None
    if progress is not None:
        known = {tuple(widths): value for widths, value in progress["scores"]}
        if any(len(widths) != len(space.names) for widths in known):
            raise ConfigError("widths: the search to go on with was over other fields; start anew")

    def ask(widths: Widths) -> float:
        if widths not in known:
            known[widths] = comparable(score(widths))
            if save is not None:
                save({"scores": [[list(w), value] for w, value in known.items()]})
        return known[widths]

    whole = ask(space.widest)
    losses = [
        {width: whole - ask((*space.widest[:n], width, *space.widest[n + 1 :])) for width in widths}
        for n, widths in enumerate(space.choices)
    ]
    finalists = dict.fromkeys([_widened(space, _narrowed(space, losses), losses)])
    finalists |= dict.fromkeys(space.power_laws(_EXPONENTS))
    last = final_score or ask
    finals = {widths: comparable(last(widths)) for widths in finalists}
    best = min(finals, key=lambda widths: (-finals[widths], space.size(widths), widths))
    return best, finals[best], len(known)


def _narrowed(space: WidthSpace, losses: list[dict[int, float]]) -> Widths:
    """From the widest down into the budget, each time where a byte saved costs least."""
    current = space.widest
    while not space.fits(current):
        steps = []
        for n, (widths, sizes) in enumerate(zip(space.choices, space.sizes)):
            at = widths.index(current[n])
            for below in range(at):
                saved = sizes[at] - sizes[below]
                if saved > 0:
                    cost = losses[n][widths[below]] - losses[n][current[n]]
                    steps.append((cost / saved, -saved, n, widths[below]))
        _, _, field, width = min(steps)
        current = (*current[:field], width, *current[field + 1 :])
    return current


def _widened(space: WidthSpace, current: Widths, losses: list[dict[int, float]]) -> Widths:
    """Use the bytes that the last narrowing left over, where that gains anything."""
    while True:
        steps = []
        for n, widths in enumerate(space.choices):
            for width in widths[widths.index(current[n]) + 1 :]:
                gain = losses[n][current[n]] - losses[n][width]
                wider = (*current[:n], width, *current[n + 1 :])
                if gain > 0 and space.fits(wider):
                    steps.append((-gain, space.size(wider), wider))
        if not steps:
            return current
        current = min(steps)[2]
