"""A benchmark of real processes, killed outright again and again, then finished by two workers at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from embcomp.benchmark.benchmark_result import BenchmarkResult
from embcomp.benchmark.ledger import read_ledger, verify_ledger
from embcomp.benchmark.training_jobs import RUN
from embcomp.search.trials.storage import open_storage
from tests.helpers.benchmark_cases import benchmark_document
from tests.helpers.long import KILLS
from tests.helpers.search_cases import write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]


def start(config, folder):
    command = [sys.executable, "-m", "embcomp.cli", "benchmark", str(config)]
    return subprocess.Popen(
        [*command, "--folder", str(folder), "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_anywhere_it_goes_on_and_trains_nothing_twice(tmp_path):
    recipe = write_recipe(tmp_path)
    config = tmp_path / "benchmark.yaml"
    tuning = {"trials": 1, "rounds": 1}
    config.write_text(yaml.safe_dump(benchmark_document(recipe, methods=["hash"], tuning=tuning)))
    home, draw = tmp_path / "all" / "toy_benchmark", random.Random(7)
    for _ in range(max(1, KILLS // 2)):
        worker = start(config, home.parent)
        time.sleep(draw.uniform(4, 16))
        os.kill(worker.pid, signal.SIGKILL)
        worker.communicate()
    workers = [start(config, home.parent) for _ in range(2)]
    for worker in workers:
        _, said = worker.communicate(timeout=900)
        assert worker.returncode == 0, said
    for summary in optuna.get_all_study_summaries(open_storage(None, home)):
        study = optuna.load_study(study_name=summary.study_name, storage=open_storage(None, home))
        done = Counter(
            trial.params[RUN] for trial in study.trials if trial.state is TrialState.COMPLETE
        )
        assert set(done.values()) == {1} and len(done) == 2, summary.study_name
    assert verify_ledger(home / "ledger.jsonl").problems == []
    assert len(read_ledger(home / "ledger.jsonl")) == 4
    (group,) = BenchmarkResult.load(home).groups
    assert {cell.seeds for cell in group.cells} == {2}
