"""A search on a supernet that is killed, whenever that is, ends as one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import optuna
import pytest
import torch
import yaml
from optuna.trial import TrialState

from embcomp.search.api import search
from embcomp.search.attempts import RETRY_OF
from embcomp.search.config.search_config import load_search
from embcomp.search.trials.storage import JOURNAL, open_storage
from tests.helpers.search_cases import search_document, train_here, write_recipe

pytestmark = pytest.mark.slow

COUNT = 40
PATIENCE = 240  # seconds, of a machine that is busy


@pytest.fixture(scope="module")
def search_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    document = search_document(
        write_recipe(folder),
        evaluator={"name": "supernet", "method": "matryoshka"},
        sampler={"name": "evolution", "population": 6},
        groups=[{"choices": [{"method": "low_dim", "width": list(range(1, 9))}]}],
        overrides={"train": {"epochs": 40}},
        trials={"count": COUNT, "devices": "cpu", "threads": 1},
        fidelity={},
        finals={"points": 0},
        fill=False,
    )
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def one_thread():
    """As the trainings have it: sums of floats depend on how many threads add them up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kill_when(ready, search_file, folder):
    """Run the search's command until something is there, and kills it with signal 9."""
    command = "from embcomp.cli import main; main()"
    arguments = ["search", str(search_file), "--searches", str(folder), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", command, *arguments], env=environment)
    try:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            assert process.poll() is None, "the search ended before it could be killed"
            assert time.monotonic() < deadline, "the search did not get there"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def trials_of(home):
    """A study's trials; nobody writes to it now."""
    storage = open_storage(None, home)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.load_study(study_name=home.name, storage=storage).trials


def outcome(result):
    return [(c.state, c.options, c.values, c.serve_bytes) for c in result.candidates]


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_search_ends_as_one_that_was_left_alone(
    search_file, tmp_path, monkeypatch, one_thread
):
    home = tmp_path / "killed" / "toy_search"
    supernet, journal = home / "supernet", home / JOURNAL

    kill_when(lambda: any(supernet.rglob("checkpoints/step-*")), search_file, home.parent)
    assert not (supernet / "report.json").exists()
    assert not any(trial.state.is_finished() for trial in trials_of(home))

    def some_are_scored():
        return journal.read_text(errors="replace").count('"outcome"') >= 5

    kill_when(some_are_scored, search_file, home.parent)
    killed = trials_of(home)
    scored = {trial.number: trial for trial in killed if trial.state is TrialState.COMPLETE}
    assert 4 <= len(scored) < COUNT
    trained = (supernet / "report.json").read_bytes()

    started = train_here(monkeypatch)
    config = load_search(search_file)
    result = search(config, folder=home.parent, quiet=True)
    assert started == [] and (supernet / "report.json").read_bytes() == trained
    after = trials_of(home)
    for number, trial in scored.items():
        assert after[number].datetime_complete == trial.datetime_complete
        assert after[number].values == trial.values
    again = [trial.user_attrs[RETRY_OF] for trial in after if RETRY_OF in trial.user_attrs]
    assert len(again) <= 1 and not scored.keys() & set(again)

    alone = search(config, folder=tmp_path / "alone", quiet=True)
    assert len(result.candidates) == COUNT
    assert outcome(result) == outcome(alone)
    assert result.cost.prepared_trainings == alone.cost.prepared_trainings
