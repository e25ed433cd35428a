"""`embcomp search`: from a YAML to retrained points, with every trial in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.config.train_config import load_config
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.search.config.search_config import load_search, parse_search
from embcomp.search.evaluators.base import TrialResult
from embcomp.search.evaluators.dataset_view import write_view
from embcomp.search.evaluators.training_evaluator import Slot, TrainingRun, _launcher, make_slots
from embcomp.search.evaluators.trial_process import PARENT, describe
from embcomp.search.reporting.results import SearchResult
from embcomp.search.trials.storage import JournalLock
from embcomp.training.api import train
from embcomp.training.reporting.report import Report
from tests.helpers.long import long_but
from tests.helpers.search_cases import search_document, train_here, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("search_run"))


def write_search(folder, recipe, **changes):
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(search_document(recipe, **changes)))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, ["search", *map(str, arguments)])


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory):
    """A finished search over two objectives with rungs and timed look-ups."""
    folder = tmp_path_factory.mktemp("searches")
    search = write_search(
        folder,
        recipe,
        objectives=["auc", "bytes", "latency"],
        fidelity={"max_steps": 6, "valid_rows": 100, "rungs": {"min_steps": 2}},
        trials={"count": 3, "devices": "cpu", "parallel": 2},
    )
    result = run(search, "--searches", folder / "all", "--quiet")
    assert result.exit_code == 0, result.output
    return search, folder / "all" / "toy_search", result.stdout


def test_a_search_ends_in_points_that_were_retrained(finished):
    _, home, printed = finished
    result = SearchResult.load(home)
    assert [c.number for c in result.candidates] == [0, 1, 2]
    assert result.candidates[0].kind == "uniform"
    for candidate in result.candidates:
        assert candidate.serve_bytes <= result.budget
        assert candidate.state == "complete" or candidate.state.startswith("stopped")
        if candidate.state == "complete":
            assert set(candidate.values) == {"auc", "bytes", "latency"}
            assert candidate.values["latency"] > 0 and candidate.steps == 6
    assert result.fidelity == "6 of 16 training steps, scored on 100 of 256 validation rows"
    assert result.cost.trainings == 3 and result.cost.full_trainings <= 3 * 6 / 16
    assert [len(point.runs) for point in result.points] == [1] * len(result.points)
    assert any(point.baseline for point in result.points)
    for point in result.points:
        assert 0 < point.runs[0].test["auc"] < 1
        assert point.name in printed


def test_each_point_is_a_recipe_that_trains_to_the_same_figures(finished, tmp_path):
    _, home, _ = finished
    point = SearchResult.load(home).points[0]
    assert (home / point.recipe).read_text().startswith("# Found by a search")
    config = load_config(home / point.recipe, [f"seed={point.runs[0].seed}"])
    report = train(config, runs=tmp_path, quiet=True)
    assert report.test is not None and report.test["auc"] == point.runs[0].test["auc"]
    assert report.serve_bytes == point.serve_bytes


def test_candidates_never_see_test_data(finished):
    _, home, _ = finished
    view = DatasetInfo.load(home / "data")
    assert sorted(view.splits) == ["train", "valid"]
    assert view.split("valid").rows == 100 and view.bayes is None
    for trial in sorted((home / "trials").glob("trial-????")):
        records = (trial / "metrics.jsonl").read_text().splitlines()
        kinds = {json.loads(line)["kind"] for line in records}
        assert kinds <= {"train", "valid"}
        assert load_config(trial / "config.yaml").data.path == str((home / "data").resolve())
        assert not (trial / "checkpoints").exists()


def test_the_page_needs_nothing_else_and_shows_every_part(finished):
    _, home, _ = finished
    page = (home / "search.html").read_text()
    for text in ("against bytes", "What each table got", "What the search cost", "Candidates"):
        assert text in page
    for mark in ('src="http', "src='http", "<link", 'rel="stylesheet'):
        assert mark not in page
    for point in SearchResult.load(home).points:
        assert point.name in page


def test_the_same_command_again_trains_nothing_and_says_the_same(finished):
    search, home, printed = finished
    before = (home / "search_result.json").read_text()
    logs = {path: path.stat().st_mtime for path in home.rglob("*.log")}
    again = run(search, "--searches", home.parent, "--quiet")
    assert again.exit_code == 0 and again.stdout == printed
    assert (home / "search_result.json").read_text() == before
    assert {path: path.stat().st_mtime for path in home.rglob("*.log")} == logs


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget=31%", "budget: "),
        ("fidelity.max_steps=5", "fidelity.steps: 6 -> 5"),
        ("groups=[{choices: [{method: low_dim, width: [1, 2]}]}]", "space.C1"),
        ("objectives=[log_loss, bytes, latency]", "began as another search"),
        ("overrides.train.dense_optimizer.learning_rate=0.1", "learning_rate: 0.001 -> 0.1"),
    ],
)
def test_a_changed_search_is_refused_and_loses_nothing(finished, override, message):
    search, home, _ = finished
    before = (home / "study.journal").read_bytes()
    result = run(search, override, "--searches", home.parent)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.output
    assert (home / "study.journal").read_bytes().startswith(before)
    assert SearchResult.load(home).candidates


def test_a_locked_study_is_one_message_and_loses_nothing(finished):
    search, home, printed = finished
    before = (home / "study.journal").read_bytes()
    holder = JournalLock(home / "study.journal")
    assert holder.acquire()
    result = run(search, "--searches", home.parent)
    holder.release()
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "study.journal is locked by another process" in result.stderr
    assert (home / "study.journal").read_bytes() == before
    assert run(search, "--searches", home.parent, "--quiet").stdout == printed


def test_dry_run_shows_the_space_and_three_plans_and_writes_nothing(recipe, tmp_path):
    search = write_search(tmp_path, recipe, objectives=["auc", "bytes"])
    result = run(search, "--dry-run", "--searches", tmp_path / "all")
    assert result.exit_code == 0, result.output
    assert "64 candidates: 3 choices for 3 tables" in result.stdout
    assert "reachable" in result.stdout and "budget" in result.stdout
    assert result.stdout.count("of the budget") == 3
    assert not (tmp_path / "all").exists()


def test_dry_run_places_a_billion_rows_on_described_devices(recipe, tmp_path):
    tables = tmp_path / "tables.yaml"
    tables.write_text("".join(f"C{i}: {i * 10_000_000}\n" for i in range(1, 15)))
    topology = {"world_size": 8, "device_memory": "40GiB"}
    search = write_search(tmp_path, recipe, topology=topology)
    result = run(search, "--dry-run", "--tables", tables)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("placed on 8 ranks") == 3
    assert run(search, "--tables", tables).exit_code == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=1%"], "the smallest takes"),
        (["objectives=[ndcg]"], "no metric is called 'ndcg'"),
        (["objectives=[gauc]"], "gauc needs a dataset with a group feature"),
        (["groups=[{choices: [full]}]"], "nothing to search"),
        (["recipe=nothing"], "no recipe 'nothing'"),
        (["overrides.data.path=nowhere"], "nowhere is not a prepared dataset"),
        (["storage=sqlite:////nowhere/study.db"], "unable to open database file"),
        (["trials.devices=[3]"], "there is no CUDA device 3"),
        (["topology={world_size: 2, device_memory: 1KiB}"], "no candidate of the space can be"),
    ],
)
def test_bad_input_is_one_message(recipe, tmp_path, overrides, message):
    search = write_search(tmp_path, recipe)
    result = run(search, *overrides, "--searches", tmp_path / "all")
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.output


@pytest.mark.long
def test_a_candidate_that_diverges_is_recorded_and_the_search_goes_on(recipe, tmp_path):
    search = write_search(
        tmp_path,
        recipe,
        overrides={"train": {"dense_optimizer": {"learning_rate": 1e30}}},
        objectives=["auc", "bytes"],
        trials={"count": 2, "parallel": 2, "devices": "cpu"},
    )
    result = run(search, "--searches", tmp_path / "all")
    assert result.exit_code == 1
    assert "no candidate was scored; diverged" in result.stderr
    home = tmp_path / "all" / "toy_search"
    found = SearchResult.load(home)
    assert [c.state for c in found.candidates] == ["diverged", "diverged"]
    assert "the training loss became" in found.candidates[0].message
    assert "the training loss became" in (home / "trials" / "trial-0000.log").read_text()


@pytest.mark.long
def test_methods_in_stages_are_candidates_like_others(recipe, tmp_path):
    methods = [
        {"method": "pq", "subvector_dim": 4, "num_codewords": 8},
        {"method": "optembed", "generations": 1, "population": 2, "target_bytes": 2000},
    ]
    search = write_search(
        tmp_path,
        recipe,
        budget="90%",
        groups=[{"choices": methods, "tied": True}],
        objectives=["auc", "bytes"],
        sampler={"name": "grid"},
        trials={"count": 2, "devices": "cpu", "parallel": 2},
        finals={"points": 0},
    )
    home = tmp_path / "all"
    result = run(search, "--searches", home, "--quiet")
    assert result.exit_code == 0, result.output
    found = SearchResult.load(home / "toy_search")
    assert found.fidelity.startswith("6 of 16 training steps in each stage")
    for candidate in found.candidates:
        assert candidate.state == "complete" and candidate.steps == 2 * 6
        trial = home / "toy_search" / "trials" / f"trial-{candidate.number:04d}"
        report = Report.load(trial)
        assert candidate.values["auc"] == report.valid["auc"]
        assert report.serve_bytes <= candidate.serve_bytes
        assert not (trial / "stages").exists()


def test_every_point_is_retrained_with_every_seed_and_only_then_sees_test_data(
    recipe, tmp_path, monkeypatch
):
    search = write_search(
        tmp_path,
        recipe,
        sampler={"name": "random"},
        finals={"points": 2, "seeds": 2, "baseline": False},
    )
    started = train_here(monkeypatch)
    result = run(search, "--searches", tmp_path / "all", "--quiet")
    assert result.exit_code == 0, result.output
    home = tmp_path / "all" / "toy_search"
    found = SearchResult.load(home)
    first = load_search(search).seed + 1
    numbers = [point.number for point in found.points]
    names = [f"trial-{n:04d}_seed-{seed}" for seed in (first, first + 1) for n in numbers]
    assert started[-4:] == names and len(started) == 3 + 4
    for point in found.points:
        assert [one.seed for one in point.runs] == [first, first + 1]
        for one in point.runs:
            folder = home / "finals" / f"trial-{point.number:04d}_seed-{one.seed}"
            report = Report.load(folder)
            assert report.test is not None and one.test["auc"] == report.test["auc"]
            assert one.valid["auc"] == report.valid["auc"] and one.steps == report.steps == 16
            assert (folder / "checkpoints").exists()  # they stay, to be exported
    tried = [Report.load(home / "trials" / f"trial-{n:04d}") for n in numbers]
    assert [report.test for report in tried] == [None, None]


def start_trial(recipe, tmp_path, **changes) -> TrainingRun:
    config = load_config(recipe, ["train.epochs=2000", "name=long"])
    path = tmp_path / "long.yaml"
    path.write_text(config.to_yaml())
    return TrainingRun(
        config_path=path,
        name="long",
        runs=tmp_path,
        slot=Slot(devices=(), threads=1),
        quality="auc",
        **changes,
    )


def outcome_of(trial: TrainingRun) -> TrialResult:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        outcome = trial.poll()
        if outcome is not None:
            return outcome
        time.sleep(0.1)
    raise AssertionError("the trial did not end")


def test_a_trial_that_is_killed_or_takes_too_long_is_an_outcome(recipe, tmp_path):
    killed = start_trial(recipe, tmp_path)
    os.killpg(killed._process.pid, signal.SIGKILL)
    outcome = outcome_of(killed)
    assert outcome.failure == "killed" and "SIGKILL" in outcome.message
    slow = start_trial(recipe, tmp_path, timeout=0.5)
    assert outcome_of(slow).failure == "timed out"
    assert not slow.is_running


def test_a_trial_does_not_outlive_its_worker(recipe, tmp_path):
    config = tmp_path / "orphan.yaml"
    config.write_text(load_config(recipe, ["train.epochs=2000", "name=orphan"]).to_yaml())
    command = [sys.executable, "-m", "embcomp.search.evaluators.trial_process", str(config)]
    done = subprocess.run(
        [*command, "--runs", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, PARENT: "999999:1"},
    )
    assert done.returncode == 1 and "is gone; stopping" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "end",
    long_but(["the launcher is killed"], ["the launcher is killed", "the trial is given up"]),
)
def test_ranks_of_a_trial_do_not_outlive_their_launcher(recipe, tmp_path, end):
    trial = start_trial(recipe, tmp_path, world_size=2)
    launcher = psutil.Process(trial._process.pid)
    try:
        metrics = trial.folder / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.exists() and metrics.stat().st_size):  # the ranks train
            assert trial.is_running and time.monotonic() < deadline, trial.log.read_text()
            time.sleep(0.1)
        ranks = [one for one in launcher.children() if "trial_process" in " ".join(one.cmdline())]
        assert len(ranks) == 2
        if end == "the launcher is killed":
            launcher.kill()
            assert outcome_of(trial).failure == "killed"
        else:
            trial.detach()
        assert not psutil.wait_procs(ranks, timeout=60)[1]
    finally:
        with suppress(psutil.NoSuchProcess):
            for process in [*launcher.children(recursive=True), launcher]:
                process.kill()


def test_trials_on_several_ranks_at_once_choose_no_port_of_their_own():
    command = _launcher(2)
    assert "--standalone" in command and "--master-port" not in command
    assert command[command.index("--local-addr") + 1] == "127.0.0.1"


def test_failures_are_told_apart():
    assert describe(MemoryError())["kind"] == "out of memory"
    assert describe(RuntimeError("CUDA out of memory. Tried"))["kind"] == "out of memory"
    text = "DefaultCPUAllocator: can't allocate memory: you tried"
    assert describe(RuntimeError(text))["kind"] == "out of memory"
    assert describe(ValueError("the training loss became nan near"))["kind"] == "diverged"
    assert describe(ValueError("else\nmore")) == {"kind": "error", "message": "else"}


def test_slots_share_a_machine_out(recipe):
    def slots(number, **trials):
        return make_slots(parse_search(search_document(recipe, trials=trials)).trials, number)

    assert [slot.devices for slot in slots(4)] == [(0,), (1,), (2,), (3,)]
    assert [slot.devices for slot in slots(5, world_size=2)] == [(0, 1), (2, 3)]
    assert [slot.devices for slot in slots(4, devices=[1, 3], parallel=2)] == [(1,), (3,)]
    assert [slot.devices for slot in slots(4, devices="cpu", parallel=3)] == [()] * 3
    assert slots(0, parallel=2, threads=5)[0].threads == 5
    with pytest.raises(ValueError, match=r"more than the 1 CUDA device"):
        slots(1, world_size=2)


def test_view_takes_rows_from_all_over_the_validation_split(recipe, tmp_path):
    source = recipe.parent / "toy"
    view = DatasetInfo.load(write_view(source, tmp_path / "view", 64))
    assert view.split("valid").rows == 64
    whole = DatasetInfo.load(write_view(source, tmp_path / "whole", None))
    assert whole.split("valid").rows == 256
    first = (tmp_path / "view" / "dataset.json").stat().st_mtime_ns
    write_view(source, tmp_path / "view", 64)
    assert (tmp_path / "view" / "dataset.json").stat().st_mtime_ns == first


def test_a_view_names_nothing_outside_its_folder(recipe, tmp_path):
    source = recipe.parent / "toy"
    names = DatasetInfo.load(write_view(source, tmp_path / "view", None)).files()
    assert names and all(name.startswith("source/") for name in names)
    # A view of an earlier version, or of a dataset that was moved, is written anew.
    text = (tmp_path / "view/dataset.json").read_text()
    (tmp_path / "view/dataset.json").write_text(text.replace('"source/', f'"{source}/'))
    (tmp_path / "moved").symlink_to(source)
    (tmp_path / "view/source").unlink()
    (tmp_path / "view/source").symlink_to(tmp_path / "moved")
    assert DatasetInfo.load(write_view(source, tmp_path / "view", None)).files() == names
    assert (tmp_path / "view/source").readlink() == source.resolve()
    assert not list((tmp_path / "view").glob(".*"))


@pytest.mark.long
@pytest.mark.slow
def test_a_trial_may_train_on_several_ranks(recipe, tmp_path):
    search = write_search(
        tmp_path,
        recipe,
        trials={"count": 1, "devices": "cpu", "world_size": 2, "threads": 1},
        finals={"points": 0},
    )
    result = run(search, "--searches", tmp_path / "all", "--quiet")
    assert result.exit_code == 0, result.output
    report = Report.load(tmp_path / "all" / "toy_search" / "trials" / "trial-0000")
    assert report.world_size == 2 and report.test is None
