"""The scores that final runs kept of the test rows, drawn again and again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from embcomp.benchmark.ledger import read_scores
from embcomp.benchmark.planned_runs import PlannedRun
from embcomp.benchmark.significance import RowBootstrap
from embcomp.benchmark.training_jobs import FOLDERS
from embcomp.errors import EmbcompError
from embcomp.search.evaluators.base import TrialResult
from embcomp.search.evaluators.trial_process import SCORES_FILE


class EndedRun(Protocol):
    """A final run and what became of it."""

    @property
    def run(self) -> PlannedRun:
        """The run."""

    @property
    def outcome(self) -> TrialResult:
        """What became of it."""


def draws_of(
    home: Path, finals: Sequence[EndedRun], *, resamples: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """The test AUC of each final run on the same draws of the test rows, by the run's name.

    A run whose scores are not in the folder, as one of a machine that does not share it, is left out.

    Args:
        home: the benchmark's folder.
        finals: the runs.
        resamples: how many draws.
        seed: of the draws.

    Raises:
        EmbcompError: two runs were scored on other rows.
    """
    paths = {
        each.run.name: home / FOLDERS["final"] / each.run.name / SCORES_FILE
        for each in finals
        if each.outcome.quality is not None
    }
    paths = {name: path for name, path in paths.items() if path.is_file()}
    if not paths:
        return {}
    labels = read_scores(next(iter(paths.values())))[1]

    def read(name: str) -> NDArray[np.float32]:
        logits, own = read_scores(paths[name])
        if not np.array_equal(own, labels):
            raise EmbcompError(
                f"{paths[name]} is of other test rows than {next(iter(paths))}, or of another number "
                "of ranks, so the two cannot be paired; remove the folder to train it again"
            )
        return logits

    return RowBootstrap(labels, resamples=resamples, seed=seed).aucs(list(paths), read)
