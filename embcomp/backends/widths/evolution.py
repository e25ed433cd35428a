"""Evolution over the widths of fields, within a budget of bytes.

The search of Lyu et al., "OptEmbed: Learning Optimal Embedding Table for Click-through Rate
Prediction", CIKM 2022, https://arxiv.org/abs/2208.04482, as a function of nothing but a space and a
score. Where we depart from the public code: candidates are tuples, so that a parent cannot change
under its child; a score stays with its candidate; the best are kept, over all generations; one-point
crossovers cut between fields; every width can be proposed, by mutation too; no candidate is scored
twice; bytes are bounded by repairing candidates; and the best are scored again on all validation
rows, never on test rows.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from embcomp.backends.widths.width_space import Widths, WidthSpace
from embcomp.errors import ConfigError
from embcomp.io.constraints import Between, Constrained, Ge

Score = Callable[[Widths], float]

_EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 0.05, 0.15, 0.25, 0.4, 0.6, 0.8)
_ATTEMPTS = 50  # at a child that is new, before the generation goes on without it


@dataclass(frozen=True, kw_only=True)
class Evolution(Constrained):
    """How long and how widely to search.

    Args:
        generations: rounds of children; 0 only scores the beginning.
        population: candidates of the beginning, half random and half power laws of the rows.
        parents: the best so far, of which children are made.
        mutants: children by mutation in each generation.
        crossovers: children of two parents in each generation.
        mutation_probability: for each field, of getting another width.
        finalists: the best, to be scored again on all rows; 0 trusts the first scores.
    """

    generations: Annotated[int, Ge(0)] = 30
    population: Annotated[int, Ge(1)] = 20
    parents: Annotated[int, Ge(1)] = 15
    mutants: Annotated[int, Ge(0)] = 10
    crossovers: Annotated[int, Ge(0)] = 10
    mutation_probability: Annotated[float, Between(0, 1, "(]")] = 0.1
    finalists: Annotated[int, Ge(0)] = 5

    @classmethod
    def owner(cls) -> str:
        """What errors begin with."""
        return "evolution: "


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Args:
        widths: of the best candidate.
        score: its score, on all rows if the best were scored again.
        size: its bytes.
        best_so_far: the best first score after each generation.
        evaluations: how many candidates were scored.
    """

    widths: Widths
    score: float
    size: int
    best_so_far: tuple[float, ...]
    evaluations: int


@dataclass
class _Archive:
    """Every candidate with its score, in the order of scoring; all that a resumed search needs."""

    space: WidthSpace
    scores: dict[Widths, float] = field(default_factory=dict)
    generation: int = 0
    known_before: int = 0  # how many were scored when the generation began
    best_so_far: list[float] = field(default_factory=list)
    final_scores: dict[Widths, float] = field(default_factory=dict)

    def best(self, count: int, among: int | None = None) -> list[Widths]:
        """The best of the candidates scored first; equals by bytes, then by widths.

        Args:
            count: how many.
            among: of the first so many; of all when None.
        """
        first = list(self.scores)[:among]
        return sorted(first, key=lambda c: self._rank(c, self.scores[c]))[:count]

    def best_finalist(self) -> tuple[Widths, float]:
        scores = self.final_scores or self.scores
        best = min(scores, key=lambda c: self._rank(c, scores[c]))
        return best, scores[best]

    def _rank(self, candidate: Widths, score: float) -> tuple[float, int, Widths]:
        return -score, self.space.size(candidate), candidate

    def to_json(self) -> dict[str, Any]:
        return {
            "space": self._fingerprint(),
            "generation": self.generation,
            "known_before": self.known_before,
            "best_so_far": list(self.best_so_far),
            "scores": [[list(c), score] for c, score in self.scores.items()],
            "final_scores": [[list(c), score] for c, score in self.final_scores.items()],
        }

    def load(self, progress: Mapping[str, Any]) -> None:
        if progress["space"] != self._fingerprint():
            raise ConfigError(
                "evolution: the search to go on with was over other fields, widths or bytes; "
                "start it anew"
            )
        self.generation = progress["generation"]
        self.known_before = progress["known_before"]
        self.best_so_far = list(progress["best_so_far"])
        self.scores = {tuple(c): score for c, score in progress["scores"]}
        self.final_scores = {tuple(c): score for c, score in progress["final_scores"]}

    def _fingerprint(self) -> list[Any]:
        space = self.space
        choices = [list(widths) for widths in space.choices]
        return [list(space.names), choices, [list(s) for s in space.sizes], space.budget]


def evolve(
    space: WidthSpace,
    score: Score,
    settings: Evolution,
    *,
    seed: int,
    final_score: Score | None = None,
    seeds: Sequence[Widths] = (),
    load: Callable[[], Mapping[str, Any] | None] | None = None,
    save: Callable[[Mapping[str, Any]], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Found:
    """Search a space of widths; same arguments, same result, interrupted or not.

    Args:
        space: what there is to choose.
        score: of a candidate within the budget; more is better.
        settings: how long to search.
        seed: of all random choices.
        final_score: scores the best again, as on more rows; None trusts `score`.
        seeds: candidates to begin with, beside the usual ones.
        load: what `save` was last given; None at the beginning.
        save: keeps JSON values after each score.
        say: gets a line per generation.
    """
    archive = _Archive(space)
    progress = load() if load is not None else None
    if progress is not None:
        archive.load(progress)

    def keep() -> None:
        if save is not None:
            save(archive.to_json())

    while archive.generation <= settings.generations:
        children = _children(archive, settings, seed, seeds)
        for candidate in children:
            if candidate not in archive.scores:
                archive.scores[candidate] = comparable(score(candidate))
                keep()
        best = archive.best(1)[0]
        archive.best_so_far.append(archive.scores[best])
        if say is not None:
            say(
                f"generation {archive.generation} of {settings.generations}: best score "
                f"{archive.scores[best]:.5f} at {space.size(best):,} bytes, "
                f"{len(archive.scores)} candidates"
            )
        archive.generation += 1
        archive.known_before = len(archive.scores)
        keep()
        if not children:
            break  # nothing is left to try
    if final_score is not None:
        for candidate in archive.best(settings.finalists):
            if candidate not in archive.final_scores:
                archive.final_scores[candidate] = comparable(final_score(candidate))
                keep()
    widths, best_score = archive.best_finalist()
    return Found(
        widths=widths,
        score=best_score,
        size=space.size(widths),
        best_so_far=tuple(archive.best_so_far),
        evaluations=len(archive.scores),
    )


def comparable(score: float) -> float:
    """A score that sorts, and that JSON can hold."""
    return float(score) if math.isfinite(score) else -sys.float_info.max


def _children(
    archive: _Archive, settings: Evolution, seed: int, seeds: Sequence[Widths]
) -> list[Widths]:
    """The generation's candidates: a function of the seed and of what was known before it."""
    draw = random.Random(f"generation/{seed}/{archive.generation}")
    new = _New(archive.space, seed, set(list(archive.scores)[: archive.known_before]))
    if archive.generation == 0:
        for candidate in seeds:
            new.add(candidate)
        halves = len(new.found) + settings.population // 2
        for candidate in archive.space.power_laws(_EXPONENTS):
            if len(new.found) < halves:
                new.add(candidate)
        new.fill(len(seeds) + settings.population, lambda: archive.space.random_candidate(draw))
        return new.found
    parents = archive.best(settings.parents, archive.known_before)
    new.fill(
        settings.mutants,
        lambda: mutate(archive.space, draw.choice(parents), settings.mutation_probability, draw),
    )
    if len(parents) > 1 and len(parents[0]) > 1:
        new.fill(len(new.found) + settings.crossovers, lambda: _child_of_two(parents, draw))
    return new.found


def _child_of_two(parents: Sequence[Widths], draw: random.Random) -> Widths:
    one, other = draw.sample(parents, 2)
    return cross(one, other, draw)


class _New:
    """Collects candidates, repaired, that were not there before."""

    def __init__(self, space: WidthSpace, seed: int, known: set[Widths]) -> None:
        self._space, self._seed, self._known = space, seed, known
        self.found: list[Widths] = []

    def add(self, candidate: Widths) -> bool:
        repaired = self._space.repair(candidate, seed=self._seed)
        if repaired in self._known:
            return False
        self._known.add(repaired)
        self.found.append(repaired)
        return True

    def fill(self, count: int, make: Callable[[], Widths]) -> None:
        """Add candidates up to a count, or until new ones are hard to find."""
        while len(self.found) < count:
            if not any(self.add(make()) for _ in range(_ATTEMPTS)):
                return


def mutate(space: WidthSpace, parent: Widths, probability: float, draw: random.Random) -> Widths:
    """A copy of a parent in which each field may have got another of its widths; one has for sure."""
    free = [n for n, widths in enumerate(space.choices) if len(widths) > 1]
    changed = {n for n in free if draw.random() < probability}
    if free and not changed:
        changed = {draw.choice(free)}
    return tuple(
        draw.choice([w for w in space.choices[n] if w != width]) if n in changed else width
        for n, width in enumerate(parent)
    )


def cross(one: Widths, other: Widths, draw: random.Random) -> Widths:
    """A child of two parents: cut once between two fields, or mixed field by field."""
    if draw.random() < 0.5:
        cut = draw.randint(1, len(one) - 1)
        return one[:cut] + other[cut:]
    return tuple(draw.choice(pair) for pair in zip(one, other))
