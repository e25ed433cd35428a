"""What scores a candidate. Training in a process of its own is one way; a supernet is another.

A worker hands candidates to an evaluator, as many at once as it has slots, and looks in on them
until each has an outcome. An evaluator that scores in no time returns handles that are done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embcomp.search.space.space import Candidate


@dataclass(frozen=True, kw_only=True)
class Task:
    """A candidate to score.

    Args:
        number: its first attempt's number, which names its files.
        candidate: what to score.
        slot: which of the worker's slots it runs in.
        seed: of its training; None takes the search's.
    """

    number: int
    candidate: Candidate
    slot: int
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A score on the way.

    Args:
        step: steps trained.
        quality: the metric then.
    """

    step: int
    quality: float


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What became of a candidate.

    Args:
        quality: the metric; None when there is none.
        failure: why there is none, in a word or two: `diverged`, `out of memory`, `killed`.
        message: what went wrong, for people.
        latency: microseconds to look up one batch, where that was asked for.
        seconds: wall time that it took.
        steps: training steps that it took.
        details: more of the result, as JSON values.
    """

    quality: float | None = None
    failure: str | None = None
    message: str = ""
    latency: float | None = None
    seconds: float = 0.0
    steps: int = 0
    details: dict[str, Any] = field(default_factory=dict)


class TrialHandle(ABC):
    """A candidate that is being scored."""

    @abstractmethod
    def poll(self) -> TrialResult | None:
        """The outcome, once there is one. Never waits."""

    def rungs(self) -> list[Rung]:
        """Scores on the way that have not been handed out yet."""
        return []

    def stop(self) -> TrialResult:
        """End it early and cleans up; says what it took."""
        return TrialResult()

    def detach(self) -> None:  # noqa: B027, optional
        """End it so that another attempt can go on from where it was."""


class Evaluator(ABC):
    """Scores candidates.

    Attributes:
        slots: how many are scored at once.
        fidelity: how much training a score stands for, for people.
        steps: training steps of a score; 0 where none are made.
        full_steps: training steps of the recipe in full.
        prepared: what was trained before the first score, once for all of them.
    """

    slots: int = 1
    fidelity: str = ""
    steps: int = 0
    full_steps: int = 0
    prepared: TrialResult = TrialResult()

    def prepare(self) -> None:  # noqa: B027, optional
        """What all scores need, as a dataset's view or a trained supernet; done once."""

    @abstractmethod
    def start(self, task: Task) -> TrialHandle:
        """Begin to score a candidate."""

    def close(self) -> None:  # noqa: B027, optional
        """End what still runs."""
