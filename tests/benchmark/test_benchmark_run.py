"""A benchmark from its YAML to its page and ledger: interrupted, joined, changed, checked again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from optuna.distributions import IntDistribution
from typer.testing import CliRunner

from embcomp.benchmark import api
from embcomp.benchmark.api import benchmark
from embcomp.benchmark.benchmark_config import parse_benchmark
from embcomp.benchmark.benchmark_result import BenchmarkResult
from embcomp.benchmark.ledger import append_entries, read_ledger, read_scores, verify_ledger
from embcomp.cli import app
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import EmbcompError
from embcomp.io.digests import sha256_of_json
from embcomp.search.evaluators.trial_process import SCORES_FILE
from embcomp.search.trials.trial_queue import SigningSampler, TrialQueue
from embcomp.training.reporting.metrics import compute_metrics
from embcomp.training.reporting.report import Report
from tests.helpers.benchmark_cases import benchmark_document, train_benchmark_here
from tests.helpers.search_cases import write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A benchmark whose worker was interrupted twice, and the trainings that were begun."""
    folder = tmp_path_factory.mktemp("comparisons")
    config = parse_benchmark(benchmark_document(recipe))
    begun = []
    for dies_at in (4, 3, None):
        with pytest.MonkeyPatch.context() as patch:
            begun.append(train_benchmark_here(patch, dies_at=dies_at))
            if dies_at is None:
                benchmark(config, folder=folder, quiet=True)
            else:
                with pytest.raises(KeyboardInterrupt):
                    benchmark(config, folder=folder, quiet=True)
    return config, folder / "toy_benchmark", begun


def test_every_method_gets_as_many_trials_and_seeds_and_nothing_runs_twice(finished):
    config, home, begun = finished
    names = [name for part in begun for name in part]
    assert len(names) == len(set(names)) == 3 * (2 + 2)
    assert [len(part) for part in begun] == [4, 3, 5]
    result = BenchmarkResult.load(home)
    (group,) = result.groups
    assert (group.cells[0].method, group.cells[0].budget) == ("full", None)
    assert {c.method for c in group.cells} == {"full", "hash", "unified"}
    for cell in group.cells:
        assert cell.trials == 2 and cell.seeds == 2 and cell.failures == []
        assert cell.auc.deviation > 0 and cell.look_up_microseconds > 0
    seeds = {(e["method"], e["seed"]) for e in read_ledger(home / "ledger.jsonl")}
    assert seeds == {(m, s) for m in ("full", "hash", "unified") for s in config.final_seeds}


@pytest.mark.long
def test_a_benchmark_that_was_interrupted_finds_what_one_that_ran_through_finds(
    finished, tmp_path, monkeypatch
):
    config, home, _ = finished
    train_benchmark_here(monkeypatch)
    benchmark(config, folder=tmp_path, quiet=True)

    def figures(folder):
        entries = read_ledger(folder / "ledger.jsonl")
        return {e["run"]: (e["metrics"], e["bytes"], e["scores_sha256"]) for e in entries}

    assert figures(tmp_path / "toy_benchmark") == figures(home)
    ours, theirs = BenchmarkResult.load(home), BenchmarkResult.load(tmp_path / "toy_benchmark")
    assert [c.against for c in ours.groups[0].cells] == [c.against for c in theirs.groups[0].cells]


def test_the_best_trial_is_what_is_trained_in_full(finished):
    _, home, _ = finished
    for entry in read_ledger(home / "ledger.jsonl"):
        tuned, scores = entry["tuned"], {}
        for run in sorted((home / "tuning").glob(f"deepfm-{entry['method']}-*/report.json")):
            report = Report.load(run.parent)
            document = yaml.safe_load((run.parent / "config.yaml").read_text())
            rate = document["train"]["row_optimizer"]["learning_rate"]
            scores[rate] = report.valid["auc"]
        assert len(scores) == 2
        assert tuned["best"] == max(scores.values()) == scores[tuned["row_learning_rate"]]


def test_trials_that_tune_have_no_test_rows_and_final_runs_read_them_once(finished):
    _, home, _ = finished
    assert sorted(DatasetInfo.load(home / "data").splits) == ["train", "valid"]
    for kind, counts in (("tuning", 0), ("finals", 1)):
        runs = sorted((home / kind).glob("*/metrics.jsonl"))
        assert len(runs) == 6
        for records in runs:
            kinds = [json.loads(line)["kind"] for line in records.read_text().splitlines()]
            assert kinds.count("test") == counts
            assert (records.parent / SCORES_FILE).exists() == bool(counts)
            assert not (records.parent / "checkpoints").exists()


def test_kept_scores_are_those_of_the_reported_metrics(finished):
    _, home, _ = finished
    for report in (home / "finals").glob("*/report.json"):
        logits, labels = read_scores(report.parent / SCORES_FILE)
        found = compute_metrics(logits, labels)
        assert found.auc == Report.load(report.parent).test["auc"]
        assert len(labels) == 256


def test_bytes_are_those_of_reports_and_within_the_budget(finished):
    config, home, _ = finished
    (group,) = BenchmarkResult.load(home).groups
    for cell in group.cells:
        assert cell.tables == group.full_cut if cell.budget is None else cell.share_cut <= 0.3
        assert cell.share_uncut == cell.tables / group.full_uncut
        assert cell.dense > 0 and cell.first_order > 0
    assert config.budgets == ("30%",)


def test_references_are_compared_with_and_the_standard_error_is_said(finished):
    _, home, _ = finished
    (group,) = BenchmarkResult.load(home).groups
    against = {cell.method: set(cell.against) for cell in group.cells}
    assert against == {"full": set(), "hash": {"full"}, "unified": {"full", "hash"}}
    assert group.is_swallowed and group.positives + group.negatives == 256
    text = (home / "benchmark.md").read_text()
    assert "standard error" in text and group.warning() in text
    page = (home / "benchmark.html").read_text()
    assert "standard error" in page and 'class="warning"' in page
    assert (home / "auc_toy_deepfm.png").stat().st_size > 5000


def test_page_and_markdown_show_both_shares_in_every_table(finished):
    _, home, _ = finished
    page = (home / "benchmark.html").read_text()
    tables = re.findall(r"<thead>.*?</thead>", page)
    assert len(tables) == 3 and all("of cut" in t and "of uncut" in t for t in tables)
    head = next(line for line in (home / "benchmark.md").read_text().splitlines() if "|" in line)
    assert "of cut" in head and "of uncut" in head


@pytest.mark.long
def test_more_methods_and_seeds_keep_what_there_is(finished, recipe, tmp_path, monkeypatch):
    _, home, begun = finished
    copy = tmp_path / "toy_benchmark"
    shutil.copytree(home, copy, symlinks=True)
    started = train_benchmark_here(monkeypatch)
    more = benchmark_document(recipe, methods=["hash", "low_dim"], seeds=3)
    result = benchmark(parse_benchmark(more), folder=tmp_path, quiet=True)
    names = [name for part in begun for name in part]
    assert not set(started) & set(names)
    assert len(started) == 2 + 3 + 2  # low_dim from its start; a third seed of full and hash
    seeds = {cell.method: cell.seeds for cell in result.groups[0].cells}
    assert seeds == {"full": 3, "hash": 3, "low_dim": 3, "unified": 2}  # the ledger keeps unified


def test_another_dataset_is_refused(finished, tmp_path, monkeypatch):
    config, home, _ = finished
    started = train_benchmark_here(monkeypatch)
    copy = tmp_path / "toy_benchmark"
    shutil.copytree(home, copy, symlinks=True)
    other = write_recipe(tmp_path / "other") if (tmp_path / "other").mkdir() is None else None
    info = DatasetInfo.load(tmp_path / "other" / "toy")
    info.name = "other"
    info.save(tmp_path / "other" / "toy")
    changed = config.model_copy(update={"recipe": str(other)})
    with pytest.raises(EmbcompError, match="dataset"):
        benchmark(changed, folder=tmp_path, quiet=True)
    assert started == []


@pytest.mark.long
def test_failed_trainings_are_said_and_the_others_compared(recipe, tmp_path, monkeypatch):
    started = train_benchmark_here(monkeypatch)
    from embcomp.search.evaluators import training_evaluator

    real = training_evaluator.subprocess.Popen

    class Failed:
        pid = -1

        def poll(self):
            return 1

    def popen(command, **options):
        config = Path(command[command.index("--runs") - 1])
        return Failed() if "unified" in config.name else real(command, **options)

    monkeypatch.setattr(training_evaluator.subprocess, "Popen", popen)
    config = parse_benchmark(benchmark_document(recipe, seeds=1, tuning={"trials": 1, "rounds": 1}))
    result = benchmark(config, folder=tmp_path, quiet=True)
    assert {cell.method for cell in result.groups[0].cells} == {"full", "hash"}
    (note,) = [note for note in result.notes if "unified" in note]
    assert "every trial failed; the first: error: the process ended with status 1" in note
    assert len(started) == 4


def test_hours_that_do_not_suffice_leave_each_method_equally_tuned(
    recipe, tmp_path, monkeypatch, capsys
):
    train_benchmark_here(monkeypatch)
    config = parse_benchmark(benchmark_document(recipe))
    result = benchmark(config, folder=tmp_path, hours=1e-6)
    (group,) = result.groups
    assert {(cell.trials, cell.seeds) for cell in group.cells} == {(1, 1)}
    assert any("tuned with 1 of 2 trials" in note for note in result.notes)
    assert any("no time was left for another seed" in note for note in result.notes)
    said = capsys.readouterr().err
    assert "about" in said and "left" in said


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")])
def test_hours_must_be_a_time(recipe, tmp_path, hours):
    config = parse_benchmark(benchmark_document(recipe))
    with pytest.raises(EmbcompError, match="hours: expected a positive number"):
        benchmark(config, folder=tmp_path, hours=hours)
    assert not list(tmp_path.iterdir())


# The ledger


def ledger_with(finished, tmp_path, **changes):
    """A copy of the ledger whose first entry was changed, and signed again like an honest one."""
    _, home, _ = finished
    entries = read_ledger(home / "ledger.jsonl")
    for path, value in changes.items():
        node, *rest = path.split("__")
        target = entries[0]
        for key in [node, *rest][:-1]:
            target = target[key]
        target[[node, *rest][-1]] = value
    entries[0].pop("digest")
    entries[0]["digest"] = sha256_of_json(entries[0])
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_ledger_holds_and_says_what_figures_depend_on(finished):
    _, home, _ = finished
    found = verify_ledger(home / "ledger.jsonl")
    assert found.problems == [] and found.entries == found.rescored == 6
    for entry in read_ledger(home / "ledger.jsonl"):
        assert {"embcomp", "torch", "python"} <= set(entry["versions"])
        assert entry["hardware"]["cores"] >= 1 and entry["memory"]["peak"] > 0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"metrics__test__auc": 0.99}, "test auc of its scores is"),
        ({"bytes__tables": 7}, "its tables take"),
        ({"budget_bytes": 7}, "over its budget of 7"),
        ({"config__seed": 1}, "its config is not that of the run"),
        ({"config__train__epochs": "many"}, "epochs"),
        ({"dataset__digest": "0" * 16}, "its config is not that of the run"),
        ({"dataset__tables__C1__rows": 5}, "its tables take"),
        ({"dataset__tables": None}, "entry 1"),
        ({"scores_sha256": "0" * 64}, "is not what was written when the run ended"),
    ],
)
def test_what_is_signed_anew_but_false_is_found(finished, tmp_path, changes, problem):
    _, home, _ = finished
    found = verify_ledger(ledger_with(finished, tmp_path, **changes), home / "finals")
    assert any(problem in each for each in found.problems), found.problems
    assert all(each.startswith("entry 1 ") for each in found.problems)


def test_a_changed_entry_is_found_by_its_digest(finished, tmp_path):
    _, home, _ = finished
    path = tmp_path / "ledger.jsonl"
    path.write_text((home / "ledger.jsonl").read_text().replace('"seed": 2022', '"seed": 2029'))
    found = verify_ledger(path)
    assert len(found.problems) == 3 and found.rescored == 0
    assert all("changed after it was written" in each for each in found.problems)


def test_a_run_that_is_there_twice_is_found(finished, tmp_path):
    _, home, _ = finished
    path = tmp_path / "ledger.jsonl"
    path.write_text(2 * (home / "ledger.jsonl").read_text())
    assert len(verify_ledger(path).problems) == 6


@pytest.mark.parametrize("damage", [b"PK\x03\x04no zip", b"", b"\x00" * 300])
def test_damaged_scores_are_named(finished, tmp_path, damage):
    _, home, _ = finished
    entry = read_ledger(home / "ledger.jsonl")[0]
    scores = tmp_path / "finals" / entry["config"]["name"] / SCORES_FILE
    scores.parent.mkdir(parents=True)
    scores.write_bytes(damage)
    with pytest.raises(EmbcompError, match="holds no scores"):
        read_scores(scores)
    shutil.copy(home / "ledger.jsonl", tmp_path)
    (problem,) = verify_ledger(tmp_path / "ledger.jsonl").problems
    assert "is not what was written" in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: expected a JSON object, got list"),
        ('{"format": 2}', "expected format 1, got 2"),
        ('\n{"format": 1}', "line 2: the entry has no 'benchmark'"),
        ("\udcff", "cannot be read"),
    ],
)
def test_what_is_no_ledger_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    result = CliRunner().invoke(app, ["benchmark", "--verify", str(path)])
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.output


@pytest.mark.long
def test_others_append_to_a_ledger_and_both_are_shown(finished, recipe, tmp_path, monkeypatch):
    _, home, _ = finished
    train_benchmark_here(monkeypatch)
    shared = tmp_path / "shared.jsonl"
    shutil.copy(home / "ledger.jsonl", shared)
    alone = {"trials": 1, "rounds": 1}
    document = benchmark_document(recipe, name="other", methods=["low_dim"], seeds=1, tuning=alone)
    result = benchmark(parse_benchmark(document), folder=tmp_path, ledger=shared, quiet=True)
    assert {cell.method for cell in result.groups[0].cells} == {
        "full",
        "hash",
        "low_dim",
        "unified",
    }
    assert len(read_ledger(shared)) == 6 + 2 - 1  # full tables are trained alike with one seed
    assert append_entries(shared, read_ledger(shared)) == read_ledger(shared)


def test_the_command_again_trains_nothing_and_shows_a_plan_a_result_and_a_check(
    finished, recipe, tmp_path, monkeypatch
):
    _, home, _ = finished
    started = train_benchmark_here(monkeypatch)
    path = tmp_path / "b.yaml"
    path.write_text(yaml.safe_dump(benchmark_document(recipe)))
    run = CliRunner().invoke
    plan = run(app, ["benchmark", str(path), "--dry-run"])
    assert plan.exit_code == 0 and "3 cells: 6 trainings that tune and 6 that count" in plan.stdout
    written = ("ledger.jsonl", "benchmark.html", "benchmark.md", "benchmark_result.json")
    before = {name: (home / name).read_bytes() for name in written}
    shown = run(app, ["benchmark", str(path), "--folder", str(home.parent), "--quiet"])
    assert shown.exit_code == 0 and "unified" in shown.stdout and "of uncut" in shown.stdout
    assert before == {name: (home / name).read_bytes() for name in written}
    check = run(app, ["benchmark", "--verify", str(home / "ledger.jsonl")])
    assert check.exit_code == 0 and "all of it holds" in check.stdout
    valid = run(app, ["validate", str(path)])
    assert valid.exit_code == 0 and "a sound benchmark that agrees" in valid.stdout
    for wrong, text in (
        (["benchmark"], "name a benchmark YAML"),
        (["benchmark", str(path), "--verify", "x"], "takes no benchmark YAML"),
        (["benchmark", "--verify", str(tmp_path / "none")], "no such ledger"),
        (["benchmark", str(path), "seeds=0", "--dry-run"], "seeds"),
    ):
        result = run(app, wrong)
        assert result.exit_code == 1 and text in result.stderr, result.output
    assert started == []


def test_what_an_earlier_plan_left_waiting_is_not_waited_for():
    """A benchmark that was killed, then shortened, ends; what waits for the old plan stays."""
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="s", sampler=SigningSampler())
    space = {"run": IntDistribution(0, 10)}

    def queue(*numbers):
        planned = [{"run": number} for number in numbers]
        return TrialQueue(study, storage, space, count=len(planned), retries=1, planned=planned)

    assert queue(1, 2, 3).has_next()
    later = queue(3, 4)
    assert later.has_next() and later.others_run()
    found = []
    for _ in range(6):
        trial = later.next() if later.has_next() else None
        if trial is not None:
            found.append(trial.params["run"])
            study.tell(trial, 1.0)
    assert sorted(found) == [3, 4] and not later.has_next() and not later.others_run()


def test_scores_of_other_rows_are_not_paired(finished, tmp_path, monkeypatch):
    config, home, _ = finished
    copy = tmp_path / "toy_benchmark"
    shutil.copytree(home, copy, symlinks=True)
    scores = next((copy / "finals").glob(f"*/{SCORES_FILE}"))
    logits, labels = read_scores(scores)
    np.savez(scores, logits=logits, labels=1 - labels)
    train_benchmark_here(monkeypatch)
    with pytest.raises(EmbcompError, match="cannot be paired"):
        benchmark(config, folder=tmp_path, quiet=True)
    assert api.BENCHMARKS == "comparisons"
