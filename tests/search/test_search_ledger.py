"""Nothing finished is lost or done twice, whoever dies and whenever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from embcomp.search.attempts import (
    INTERRUPTED,
    PLANNED,
    PROPOSER,
    RETRY_OF,
    STALE,
    SURPLUS,
    WORKER,
    latest_attempts,
    next_of,
    number_of,
    originals,
    sign_proposal,
    wait_for_earlier,
)
from embcomp.search.evaluators.base import TrialHandle
from embcomp.search.trials.storage import StorageError, explained, open_storage
from embcomp.search.trials.trial_queue import SigningSampler, TrialQueue
from embcomp.search.trials.worker import TrialRunner, Worker

pytestmark = pytest.mark.slow

SPACE = {"x": IntDistribution(0, 1000)}
DEAD = f"{os.uname().nodename}:999999:1"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def make_queue(folder, *, count=3, retries=2, name="study", planned=None):
    storage = open_storage(None, folder)
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        sampler=optuna.samplers.RandomSampler(seed=0) if planned is None else SigningSampler(),
        load_if_exists=True,
    )
    return TrialQueue(study, storage, SPACE, count=count, retries=retries, planned=planned)


def abandon(queue, worker=DEAD):
    """Start a candidate as a worker that then dies."""
    trial = queue.next()
    trial.set_user_attr(WORKER, worker)
    return trial


def finish(queue):
    trial = queue.next()
    queue.study.tell(trial, 0.5)
    return trial


def test_a_candidate_of_a_dead_worker_is_done_again_and_once(tmp_path):
    queue = make_queue(tmp_path)
    lost = abandon(queue)
    assert queue.retry_stale() == [0]
    assert queue.retry_stale() == []
    again = queue.next()
    assert again.user_attrs[RETRY_OF] == 0 and again.params == lost.params
    queue.study.tell(again, 0.7)
    for _ in range(2):
        finish(queue)
    assert not queue.has_next()
    assert [t.state for t in latest_attempts(queue.study)] == [TrialState.COMPLETE] * 3
    assert len(originals(queue.study)) == 3 and len(queue.study.trials) == 4


def test_a_living_worker_keeps_its_candidates(tmp_path):
    queue = make_queue(tmp_path)
    queue.next()
    far = abandon(queue, "elsewhere:1:1")
    queue.study.set_user_attr("worker elsewhere:1:1", time.time())
    assert queue.retry_stale() == []
    queue.study.set_user_attr("worker elsewhere:1:1", time.time() - 1000)
    assert queue.retry_stale() == [far.number]


def test_two_that_look_at_once_take_a_lost_candidate_once(tmp_path):
    one, two = make_queue(tmp_path), make_queue(tmp_path)
    abandon(one)
    trial = two.study.trials[0]
    assert one.claim_stale(trial)
    assert not two.claim_stale(trial)


def test_a_worker_that_dies_between_taking_and_enqueueing_is_made_good(tmp_path):
    queue = make_queue(tmp_path)
    abandon(queue)
    storage_id = queue._storage.get_trial_id_from_study_id_trial_number(queue._study_id, 0)
    queue._storage.set_trial_user_attr(storage_id, STALE, DEAD)
    queue.study.tell(0, state=TrialState.FAIL)
    assert queue.retry_stale() == [0]
    assert queue.retry_stale() == []


def test_a_candidate_that_kills_its_workers_is_given_up(tmp_path):
    queue = make_queue(tmp_path, count=1, retries=2)
    for _ in range(3):
        abandon(queue)
        queue.retry_stale()
    assert not queue.has_next()
    (last,) = latest_attempts(queue.study)
    assert last.state is TrialState.FAIL


def test_a_candidate_without_parameters_leaves_no_gap(tmp_path):
    queue = make_queue(tmp_path, count=1)
    trial = queue.study.ask()  # its worker dies before anything was drawn
    queue._storage.set_trial_user_attr(trial._trial_id, WORKER, DEAD)
    assert queue.retry_stale() == []
    assert queue.has_next()
    assert finish(queue).params
    assert not queue.has_next() and len(originals(queue.study)) == 1


def test_a_candidate_that_was_only_proposed_is_proposed_anew_at_once(tmp_path):
    queue = make_queue(tmp_path, count=2)
    finish(queue)
    asked = queue.study.ask(fixed_distributions=SPACE)  # its worker dies before it signs this
    queue.study.set_user_attr(f"worker {DEAD}", time.time())
    assert asked.params and queue.retry_stale() == []
    assert len(originals(queue.study)) == 1  # so that the next has the rank that this one had
    finish(queue)
    assert not queue.has_next() and not queue.others_run()


def test_a_candidate_that_a_living_worker_may_be_proposing_is_left_alone(tmp_path):
    queue = make_queue(tmp_path)
    queue.study.set_user_attr("worker elsewhere:1:1", time.time())
    queue.study.ask(fixed_distributions=SPACE)
    assert queue.retry_stale() == []
    assert len(originals(queue.study)) == 1 and queue.others_run()


def test_the_count_is_kept_by_workers_that_start_at_once(tmp_path):
    one, two = make_queue(tmp_path, count=3), make_queue(tmp_path, count=3)
    assert one.has_next() and two.has_next()
    started = [queue.next() for queue in (one, two, one, two)]
    assert [trial is None for trial in started] == [False, False, False, True]
    assert len(originals(one.study)) == 3


PLAN = [{"x": 7}, {"x": 5}, {"x": 9}]


def finish_all(*queues):
    """End whatever is left, the queues taking turns; returns what was trained, in order."""
    trained = []
    while any(queue.has_next() for queue in queues):
        for queue in queues:
            trial = queue.next() if queue.has_next() else None
            if trial is not None:
                trained.append(trial.params["x"])
                queue.study.tell(trial, 0.5)
    return trained


def test_what_is_planned_is_done_in_order_and_no_more(tmp_path):
    queue = make_queue(tmp_path, planned=PLAN)
    assert finish_all(queue) == [7, 5, 9]
    assert finish_all(make_queue(tmp_path, planned=PLAN)) == []
    assert queue.next() is None  # a worker that came too late
    assert len(latest_attempts(queue.study)) == 3


def test_two_that_enqueue_a_plan_at_once_do_each_of_it_once(tmp_path):
    one, two = (make_queue(tmp_path, planned=PLAN) for _ in range(2))
    for params in PLAN:  # as both do when neither sees the other's
        for queue in (one, two):
            queue.study.enqueue_trial(params, user_attrs={PLANNED: params})
    assert finish_all(one, two) == [7, 5, 9]
    assert [t.params["x"] for t in latest_attempts(one.study)] == [7, 5, 9]
    assert not one.others_run()


def test_a_planned_candidate_whose_worker_dies_before_it_signs_is_enqueued_anew_at_once(tmp_path):
    queue = make_queue(tmp_path, planned=PLAN)
    assert queue.has_next()
    left = queue.study.ask(fixed_distributions=SPACE)
    queue._storage.set_trial_user_attr(left._trial_id, PROPOSER, DEAD)
    queue.study.set_user_attr("worker elsewhere:1:1", time.time())  # another one lives
    assert queue.retry_stale() == []
    assert finish_all(queue) == [5, 9, 7]
    assert sorted(t.params["x"] for t in latest_attempts(queue.study)) == [5, 7, 9]


def test_a_planned_candidate_of_a_dead_worker_is_tried_as_often_as_any(tmp_path):
    queue = make_queue(tmp_path, planned=PLAN[:1], retries=1)
    assert queue.has_next()
    abandon(queue)
    assert queue.retry_stale() == [0] and queue.has_next()
    abandon(queue)
    assert queue.retry_stale() == [] and not queue.has_next()
    (last,) = latest_attempts(queue.study)
    assert last.state is TrialState.FAIL


def test_a_study_whose_trials_a_sampler_proposed_goes_on_as_planned(tmp_path):
    before = make_queue(tmp_path)
    trial = before.study.ask(fixed_distributions={"x": IntDistribution(5, 5)})
    trial.set_user_attr(WORKER, before.worker)
    before.study.tell(trial, 0.5)
    before.study.ask(fixed_distributions=SPACE)  # never signed, its worker is gone
    queue = make_queue(tmp_path, planned=PLAN)
    assert queue.retry_stale() == []
    assert finish_all(queue) == [7, 9]


class Endless(TrialHandle):
    """A candidate that runs until it is let go."""

    def __init__(self):
        self.was_let_go = False

    def poll(self):
        return None

    def detach(self):
        self.was_let_go = True


class EndlessJobs(TrialRunner):
    def __init__(self, when_started):
        self.runs, self._when_started = [], when_started

    def ready(self):
        return True

    def start(self, trial, slot):
        self.runs.append(Endless())
        self._when_started(len(self.runs))
        return self.runs[-1]

    def is_behind(self, hand, rung):
        return False

    def values(self, trial, outcome):
        return []

    def line(self, trial, outcome, what):
        return ""


class Silent:
    def update(self, running):
        pass

    def log(self, text):
        pass


def test_a_storage_that_goes_away_ends_what_runs_and_is_one_message(tmp_path):
    folder = tmp_path / "search"
    queue = make_queue(folder)

    def lose_storage(started):
        if started == 2:
            folder.rename(tmp_path / "elsewhere")

    jobs = EndlessJobs(lose_storage)
    with (
        pytest.raises(StorageError, match=r"study\.journal.*Finished candidates are kept"),
        explained(None, folder),
    ):
        Worker(queue, jobs, Silent(), 2).run()
    assert [run.was_let_go for run in jobs.runs] == [True, True]
    # Back in its place, the study is whole: the two are still on its books.
    (tmp_path / "elsewhere").rename(folder)
    assert [trial.state for trial in make_queue(folder).study.trials] == [TrialState.RUNNING] * 2


WORKER_SCRIPT = """
import sys, time
from pathlib import Path
import optuna
optuna.logging.set_verbosity(optuna.logging.WARNING)
from embcomp.search.evaluators.base import TrialHandle, TrialResult
from embcomp.search.attempts import number_of
from embcomp.search.trials.worker import TrialRunner, Worker
from tests.search.test_search_ledger import make_queue
assert 'torchrec' not in sys.modules  # a worker's bookkeeping is light

folder = Path(sys.argv[1])

class Sleep(TrialHandle):
    def __init__(self): self.until = time.monotonic() + 0.15
    def poll(self): return TrialResult(quality=0.5) if time.monotonic() > self.until else None

class Sleeps(TrialRunner):
    def ready(self): return True
    def start(self, trial, slot): return Sleep()
    def is_behind(self, hand, rung): return False
    def values(self, trial, outcome):
        with (folder / "told.txt").open("a") as file:
            file.write(f"{number_of(trial)}\\n")
        return [trial.params["x"]]
    def line(self, trial, outcome, what): return ""

class Silent:
    def update(self, running): pass
    def log(self, text): pass

planned = [{"x": x} for x in range(16)] if "planned" in sys.argv else None
queue = make_queue(folder, count=16, retries=5, planned=planned)
Worker(queue, Sleeps(), Silent(), 2).run()
"""


def start_worker(folder, *how):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER_SCRIPT, str(folder), *how],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("how", ["proposed", "planned"])
def test_two_workers_and_kill_minus_nine_lose_and_double_nothing(tmp_path, how):
    one, two = start_worker(tmp_path, how), start_worker(tmp_path, how)
    told = tmp_path / "told.txt"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and len(lines(told)) < 6:
        time.sleep(0.05)
    one.send_signal(signal.SIGKILL)
    one.wait()
    assert two.wait(90) == 0
    study = make_queue(tmp_path).study
    ended = latest_attempts(study)
    assert len(ended) == 16
    assert all(trial.state is TrialState.COMPLETE for trial in ended)
    # A killed worker may have told its log and not the study; the study has each once.
    complete = [t for t in study.trials if t.state is TrialState.COMPLETE]
    assert len(complete) == 16
    assert 16 <= len(lines(told)) <= 18
    if how == "planned":
        assert sorted(trial.params["x"] for trial in complete) == list(range(16))


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.long
def test_a_search_that_was_killed_whole_goes_on(tmp_path):
    worker = start_worker(tmp_path)
    told = tmp_path / "told.txt"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and len(lines(told)) < 5:
        time.sleep(0.05)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    before = {t.number for t in make_queue(tmp_path).study.trials if t.state is TrialState.COMPLETE}
    assert start_worker(tmp_path).wait(90) == 0
    study = make_queue(tmp_path).study
    complete = [t.number for t in study.trials if t.state is TrialState.COMPLETE]
    assert before <= set(complete) and len(complete) == 16
    journal = (tmp_path / "study.journal").read_text().splitlines()
    assert all(json.loads(line) for line in journal)


def test_a_proposer_that_dies_is_not_waited_for(tmp_path):
    queue = make_queue(tmp_path, count=2)
    left = queue.study.ask()  # its worker dies while it draws parameters
    queue._storage.set_trial_user_attr(left._trial_id, PROPOSER, DEAD)
    queue.study.set_user_attr("worker elsewhere:1:1", time.time())  # another one lives
    mine = queue.study.ask()
    begun = time.monotonic()
    wait_for_earlier(queue.study, mine, SPACE)
    assert time.monotonic() - begun < 2
    assert queue.retry_stale() == [] and SURPLUS in queue.study.trials[0].user_attrs


def test_a_proposal_waits_until_those_before_it_are_known(tmp_path):
    one, two = make_queue(tmp_path), make_queue(tmp_path)
    first, second = one.study.ask(), two.study.ask()
    sign_proposal(one.study, one.study.trials[0])
    sampled = threading.Timer(1.0, lambda: first.suggest_int("x", 0, 1000))
    sampled.start()
    begun = time.monotonic()
    wait_for_earlier(two.study, second, SPACE)
    sampled.join()
    assert time.monotonic() - begun >= 0.9
    assert "x" in two.study.trials[0].params


@pytest.mark.parametrize(
    ("tried", "place"),
    [("", 0), ("a", 1), ("ab", 2), ("b", 0), ("aba", 3), ("xx", 0), ("abac", None)],
)
def test_the_next_of_a_list_is_the_first_that_was_not_tried_as_often(tried, place):
    assert next_of("abac", tried) == place


def test_a_search_that_was_interrupted_goes_on_in_the_same_process(tmp_path):
    """As in a notebook: the worker's name is the same, and nobody else will take the trial over."""
    queue = make_queue(tmp_path)
    trial = queue.next()
    trial.set_user_attr(INTERRUPTED, True)
    again = make_queue(tmp_path)
    assert again.worker == queue.worker
    assert again.retry_stale() == [0]
    second = again.next()
    assert second.user_attrs[RETRY_OF] == 0 and number_of(second) == 0
