"""Runs killed from outside, at any moment, again and again: the same end, and nothing left behind."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embcomp.training import train
from embcomp.training.reporting.standing import standing_of
from tests.helpers.long import KILLS
from tests.helpers.staged_methods import STAGED
from tests.helpers.training_cases import write_dataset
from tests.training.test_stages import staged_config

pytestmark = pytest.mark.slow

# One process imports everything; each attempt is a fork of it that trains until it is killed.
ATTEMPTS = """
import os, sys
import torch
torch.set_num_threads(1)
from embcomp.config.train_config import load_config
from embcomp.training import api

path, runs = sys.argv[1:]
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        api.train(load_config(path), runs=runs, quiet=True)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
TIMED = ("samples_per_second", "train_seconds", "wall_seconds")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def without_times(run: Path) -> dict:
    report = json.loads((run / "report.json").read_text())
    for part in (report, *report["stages"]):
        for key in TIMED:
            part.pop(key, None)
    return report


def files_of(run: Path) -> set[str]:
    """What a run leaves, but for TensorBoard's files, whose names hold times."""
    return {
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.is_file() and "tensorboard" not in path.parts
    }


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", STAGED)
def test_kills_at_any_moment_change_nothing_and_leave_nothing(dataset, tmp_path, method):
    config = staged_config(dataset, method, "train.checkpoint_every=1", "train.keep_checkpoints=2")
    train(config, runs=tmp_path / "whole", quiet=True)
    whole, killed = tmp_path / "whole" / method, tmp_path / "killed" / method
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    draw = random.Random(method)
    root = Path(__file__).parents[2]
    starter = subprocess.Popen(
        [sys.executable, "-c", ATTEMPTS, str(path), str(tmp_path / "killed")],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def attempt(seconds: float | None) -> int:
        """Start the run, kills it after it has got on and so many seconds have passed."""
        before = standing_of(killed)
        starter.stdin.write("\n")
        starter.stdin.flush()
        child = int(starter.stdout.readline())
        if seconds is not None:
            deadline = time.monotonic() + 60
            while standing_of(killed) == before and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(seconds)
            subprocess.run(["kill", "-9", str(child)], check=False, stderr=subprocess.DEVNULL)
        return int(starter.stdout.readline())

    codes = []
    while len(codes) < KILLS and 0 not in codes:
        codes.append(attempt(draw.uniform(0, 0.1)))
    assert set(codes) <= {0, -signal.SIGKILL}
    assert codes.count(-signal.SIGKILL) >= 3
    assert attempt(None) == 0
    starter.stdin.close()
    starter.wait(timeout=30)
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert without_times(killed) == without_times(whole)
    assert files_of(killed) == files_of(whole)
