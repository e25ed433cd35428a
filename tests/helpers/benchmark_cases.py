"""A toy benchmark whose trainings run in the test's own process, and ledgers made of nothing."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embcomp.config.train_config import load_config
from embcomp.search.evaluators import training_evaluator
from embcomp.search.evaluators.served_measures import measure_run
from embcomp.search.evaluators.trial_process import MEASURED_FILE, SCORES_FILE
from embcomp.search.trials import trial_queue
from embcomp.training.api import train


def benchmark_document(recipe: Path | str, **changes: Any) -> dict[str, Any]:
    """Three methods at one budget, two trials and two seeds each."""
    return {
        "name": "toy_benchmark",
        "recipe": str(recipe),
        "methods": ["hash", {"method": "unified", "num_chunks": [1, 2]}],
        "budgets": ["30%"],
        "seeds": 2,
        "tuning": {"trials": 2, "rounds": 2},
        "fidelity": {"max_steps": 4, "valid_rows": 100},
        "resamples": 100,
        "processes": {"devices": "cpu"},
        **changes,
    }


class _Ended:
    """A process that ended well."""

    pid = -1

    def poll(self) -> int:
        return 0


def train_benchmark_here(
    monkeypatch: pytest.MonkeyPatch, *, dies_at: int | None = None
) -> list[str]:
    """Trainings run in this process from now on; returns the names of those that were started.

    Args:
        monkeypatch: puts the way of starting processes back.
        dies_at: the place of a training that the worker does not live to begin.
    """
    started: list[str] = []
    if dies_at is not None:  # under the name of a process that is no more when others look
        gone = f"{socket.gethostname()}:{2**22 + dies_at}:0"
        monkeypatch.setattr(trial_queue, "this_worker", lambda: gone)

    def popen(command: list[str], **_: object) -> _Ended:
        place = command.index("--runs")
        config, runs = load_config(command[place - 1]), Path(command[place + 1])
        if len(started) == dies_at:
            raise KeyboardInterrupt
        started.append(config.name)
        folder = runs / config.name
        scored = "--scored" in command
        train(config, runs=runs, quiet=True, scores=folder / SCORES_FILE if scored else None)
        if scored:
            measured = measure_run(folder, folder / SCORES_FILE, idle_memory=1)
            (folder / MEASURED_FILE).write_text(json.dumps(measured))
        return _Ended()

    replaced = SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(training_evaluator, "subprocess", replaced)
    return started
