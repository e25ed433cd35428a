"""A method's life as a list of stages: what each trains, on which data, and what it hands on.

Methods declare their stages here, without knowing the training loop that runs them. Between two
stages a method turns the tensors of one **form** into those of the next: whole tables into pruned
ones, rows into codes. Each form is an ordinary method, so every stage shards, resumes and counts its
bytes like any other training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a method's life.

    Args:
        name: unique among the method's stages; what logs and overrides call it.
        purpose: one line for people.
        kind: `train` runs the loop; `search` trains nothing and asks the method's `search`.
        epochs: passes over the stage's training rows; None takes the run's `train.epochs`, 0
            only hands over.
        max_steps: stop after this many steps, whatever the epochs say.
        rows: whether embedding rows learn.
        network: whether the model around the tables learns.
        structure: whether the parameters of the method's `combine` learn.
        alternate: whether each step on training rows, in which the structure rests, is followed by
            a step on search-validation rows in which it alone learns.
        second_order: whether the structure's gradient in those steps looks through the rows' step before
            (second order); rows must have an optimizer over whole tables.
        holds_out: whether search-validation rows are left out of the stage's training rows.
        learning_rate: factor on the run's learning rates of rows and network.
        reinit_network: whether the network begins this stage from its initial weights again.
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
    second_order: bool = False
    holds_out: bool = False
    learning_rate: float = 1.0
    reinit_network: bool = False
    keeps: Literal["best", "best_or_start", "last"] = "best"
