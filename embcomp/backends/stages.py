"""A method's life as a list of stages: what each trains, on which data, and what it hands on.

Methods declare their stages here, without knowing the training loop that runs them. Between two
stages a method turns the tensors of one **form** into those of the next: whole tables into pruned
ones, rows into codes. Each form is an ordinary method, so every stage shards, resumes and counts its
bytes like any other training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from embcomp.backends.base import BackendConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a method's life.

    Args:
        name: unique among the method's stages; what logs and overrides call it.
        purpose: one line for people.
        kind: ``train`` runs the loop; ``search`` trains nothing and asks the method's ``search``.
        epochs: passes over the stage's training rows; None takes the run's ``train.epochs``, 0
            only hands over.
        max_steps: stop after this many steps, whatever the epochs say.
        rows: whether embedding rows learn.
        network: whether the model around the tables learns.
        structure: whether the parameters of the method's ``combine`` learn.
        alternate: whether each step on training rows, in which the structure rests, is followed by
            a step on search-validation rows in which it alone learns.
        unrolls: whether the structure's gradient in those steps looks through the rows' step before
            (second order); rows must have an optimizer over whole tables.
        holds_out: whether search-validation rows are left out of the stage's training rows.
        learning_rate: factor on the run's learning rates of rows and network.
        restarts: whether the network begins this stage from its initial weights again.
        keeps: the weights that are handed on: those of the best evaluation; of the best or, where
            none is better, those that the stage began with; or the last.
    """

    name: str
    purpose: str = ""
    kind: Literal["train", "search"] = "train"
    epochs: int | None = None
    max_steps: int | None = None
    rows: bool = True
    network: bool = True
    structure: bool = True
    alternate: bool = False
    unrolls: bool = False
    holds_out: bool = False
    learning_rate: float = 1.0
    restarts: bool = False
    keeps: Literal["best", "best_or_start", "last"] = "best"


@dataclass(frozen=True, kw_only=True)
class Form:
    """A method at one moment of its life, with the tensors of its group of tables.

    Args:
        config: the method that holds the tables now.
        tensors: ``rows.<physical table>`` (true width), and what is in the state dicts of the
            method's own modules as ``route.<name>`` and ``combine.<name>``. An empty mapping
            stands for fresh weights. There may be more than the method asked for.
    """

    config: BackendConfig
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, table: str) -> Tensor:
        """(rows, true width) of a physical table."""
        return self.tensors[f"rows.{table}"]


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a method may look at when it begins a stage.

    Args:
        before: the form that the stage before left, whole and on the CPU.
        initial: the form of the first stage as it was before its first step.
        counts: for each table, (num_embeddings,) how often each id occurs in the training rows;
            empty where nobody counted.
        results: what earlier ``search`` stages found, by stage.
        seed: the run's seed.
    """

    before: Form
    initial: Callable[[], Form]
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0


class SearchContext(Protocol):
    """What a ``search`` stage works with; the same on every rank."""

    @property
    def form(self) -> Form:
        """The form that the stage before left, whole and on the CPU."""

    @property
    def combine(self) -> nn.Module:
        """The method's own ``combine`` inside the (sharded) model that ``evaluate`` runs."""

    @property
    def counts(self) -> Mapping[str, Tensor]:
        """How often each id of each table occurs in the training rows."""

    @property
    def seed(self) -> int:
        """The run's seed."""

    def shared(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Large tensors that one rank makes and all ranks read, in a host's memory once.

        Args:
            name: unique in the stage.
            make: called on one rank alone; it evaluates nothing.
        """

    def evaluate(self, rows: int | None = None) -> float:
        """Score the model as it is now on search-validation rows; more is better.

        Args:
            rows: the first so many rows; all of them when None.
        """

    def load(self) -> dict[str, Any] | None:
        """What ``save`` was last given, after an interruption; None at the beginning."""

    def save(self, progress: Mapping[str, Any]) -> None:
        """Keep JSON values that the search can go on from."""

    def say(self, text: str) -> None:
        """A line for people."""
