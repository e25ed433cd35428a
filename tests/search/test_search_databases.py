"""Workers that start at the same instant on a new database do every candidate once, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from embcomp.search.attempts import latest_attempts
from embcomp.search.trials import database
from embcomp.search.trials.storage import StorageError, open_storage
from tests.helpers.postgres import cluster

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COUNT, WORKERS = 16, 5
WORKER = """
import os, sys, time
from pathlib import Path
import optuna
from optuna.distributions import IntDistribution
from optuna.pruners import NopPruner
optuna.logging.set_verbosity(optuna.logging.WARNING)
from embcomp.search.evaluators.base import TrialHandle, TrialResult
from embcomp.search.attempts import next_of, originals, sign_proposal, wait_for_earlier
from embcomp.search.trials.trial_queue import TrialQueue
from embcomp.search.attempts import number_of
from embcomp.search.trials.worker import TrialRunner, Worker
from embcomp.search.trials.storage import explained, open_storage, open_study

url, folder = sys.argv[1], Path(sys.argv[2])
SPACE = {"x": IntDistribution(0, 1000)}

class InOrder(optuna.samplers.BaseSampler):
    def infer_relative_search_space(self, study, trial): return SPACE
    def sample_relative(self, study, trial, space):
        wait_for_earlier(study, trial, SPACE)
        known = [o.params["x"] for o in originals(study) if o.number < trial.number and o.params]
        place = next_of(range(1000), known)
        return {"x": place}
    def before_trial(self, study, trial): sign_proposal(study, trial)
    def sample_independent(self, study, trial, name, distribution): return 0

class Sleep(TrialHandle):
    def __init__(self): self.until = time.monotonic() + 0.1
    def poll(self): return TrialResult(quality=0.5) if time.monotonic() > self.until else None

class Sleeps(TrialRunner):
    def ready(self): return True
    def start(self, trial, slot):
        with (folder / "started").open("a") as file: file.write(f"{number_of(trial)}\\n")
        return Sleep()
    def is_behind(self, hand, rung): return False
    def values(self, trial, outcome): return [trial.params["x"]]
    def line(self, trial, outcome, what): return ""

class Silent:
    def update(self, running): pass
    def log(self, text): pass

def work():
    with explained(url, folder):
        storage = open_storage(url, folder)
        study = open_study(storage, "s", ["maximize"], InOrder(), NopPruner(), {"budget": 1})
        Worker(TrialQueue(study, storage, SPACE, count=COUNT, retries=5), Sleeps(), Silent(), 2).run()

# Imports take seconds, and a fork none: the workers begin at one instant.
for _ in range(WORKERS):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(WORKERS)]
print(sorted(codes), flush=True)
"""


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def server():
    with cluster() as url:
        yield url


@pytest.fixture
def url_of(request, tmp_path):
    """A new database's URL, by kind."""

    def get(kind):
        if kind == "sqlite":
            return f"sqlite:///{tmp_path / 'study.db'}"
        server = request.getfixturevalue("server")
        name = f"test_{time.monotonic_ns()}"
        address = database.with_driver(sqlalchemy.make_url(f"{server}/postgres"))
        engine = sqlalchemy.create_engine(address, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return f"{server}/{name}"

    return get


def start_together(url, folder):
    """Workers that start at one instant; their parent, and the number of each process."""
    folder.mkdir(exist_ok=True)
    script = WORKER.replace("COUNT", str(COUNT)).replace("WORKERS", str(WORKERS))
    parent = subprocess.Popen(
        [sys.executable, "-c", script, url, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    return parent, [int(parent.stdout.readline()) for _ in range(WORKERS)]


def lines(path):
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_workers_that_start_at_once_do_every_candidate_once_though_one_is_killed(
    url_of, tmp_path, kind
):
    url, folder = url_of(kind), tmp_path / "search"
    parent, workers = start_together(url, folder)
    deadline = time.monotonic() + 60
    while len(lines(folder / "started")) < COUNT // 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(workers[0], signal.SIGKILL)
    codes, errors = parent.communicate(timeout=90)
    assert codes.strip() == str([-9, 0, 0, 0, 0]), errors
    study = optuna.load_study(study_name="s", storage=open_storage(url, folder))
    ended = latest_attempts(study)
    assert [trial.state for trial in ended] == [TrialState.COMPLETE] * COUNT
    assert sorted(trial.params["x"] for trial in ended) == list(range(COUNT))
    complete = [trial for trial in study.trials if trial.state is TrialState.COMPLETE]
    assert len(complete) == COUNT
    # What the killed worker had in hand was begun once more, and nothing else.
    assert COUNT <= len(lines(folder / "started")) <= COUNT + 2


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_failure_while_others_make_the_tables_is_looked_at_again(url_of, monkeypatch, kind):
    url, attempts = url_of(kind), []
    made = database.RDBStorage

    def late(*arguments, **options):
        attempts.append(1)
        if len(attempts) < 3:
            raise sqlalchemy.exc.OperationalError("", {}, Exception("table studies already exists"))
        return made(*arguments, **options)

    monkeypatch.setattr(database, "RDBStorage", late)
    assert database.open_database(url) is not None and len(attempts) == 3


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("database is locked", "another program holds it"),
        ("table alembic_version already exists", "start the same command again"),
        ("connection to server at '127.0.0.1', port 1 failed", "check that the server runs"),
        ("database or disk is full", "make room"),
        ("attempt to write a readonly database", "there and writable"),
    ],
)
def test_each_failure_has_its_own_advice(reason, advice):
    assert advice in database.advice_on(reason)


def test_a_server_that_does_not_run_is_named_without_its_password(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(StorageError, match="check that the server runs") as error:
        open_storage("postgresql://me:secret@127.0.0.1:1/studies", tmp_path)
    assert "secret" not in str(error.value)


def test_a_missing_driver_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StorageError, match=r"driver is not installed: .*embcomp\[postgres\]"):
        open_storage("postgresql://me@127.0.0.1:1/studies", tmp_path)


def test_a_database_that_another_worker_opens_is_waited_for(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with database._one_by_one(sqlalchemy.make_url(url)):
        began = time.monotonic()
        code = (
            "import sys; from pathlib import Path; from embcomp.search.trials.storage import open_storage\n"
            "open_storage(sys.argv[1], Path('.')); print('open')"
        )
        waiting = subprocess.Popen(
            [sys.executable, "-c", code, url],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            stdout=subprocess.PIPE,
            text=True,
        )
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(4)
        assert time.monotonic() - began >= 4
    assert waiting.communicate(timeout=60)[0] == "open\n"


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_candidate_that_waits_is_taken_by_one_worker_alone(url_of, tmp_path, kind):
    url = url_of(kind)
    one, two = open_storage(url, tmp_path), open_storage(url, tmp_path)
    study = optuna.create_study(storage=one, study_name="s")
    study.enqueue_trial({"x": 1.0})
    (trial,) = study.trials
    taken, began = [], threading.Event()

    def take_late():
        began.wait()
        taken.append(two.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING))

    find = optuna.storages._rdb.models.TrialModel.find_or_raise_by_id

    def slow(*arguments, **options):
        found = find(*arguments, **options)
        if threading.current_thread() is threading.main_thread():
            began.set()
            time.sleep(0.5)  # between reading that it waits and taking it
        return found

    other = threading.Thread(target=take_late)
    other.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.storages._rdb.models.TrialModel, "find_or_raise_by_id", slow)
        taken.append(one.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING))
    other.join()
    assert sorted(taken) == [False, True]
