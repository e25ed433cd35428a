"""Methods that are trained in stages: what each stage moves, resumes to, and leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from embcomp.backends import BACKENDS
from embcomp.config.train_config import TrainConfig, load_config, parse_config
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import CheckpointError, ConfigError
from embcomp.layers.named_parts import stored_tensors
from embcomp.planning.config_plan import plan_config, sizes_of_dataset
from embcomp.serving.artefact_folder import header_bytes
from embcomp.tables.footprint import count_bytes
from embcomp.training import Report, evaluate, load_model, train
from embcomp.training.checkpoint import checkpoint_folder, saved_steps
from embcomp.training.export.export import export_run
from embcomp.training.files.checkpoint_files import CHECKSUMS_FILE, write_checksums
from embcomp.training.reporting.stage_result import read_stage_result
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.left_model import path_of
from embcomp.training.stages.loading import forms_of_run, load_unsharded
from embcomp.training.stages.run_context import RunContext
from embcomp.training.stages.schedule import StageSchedule, StageSetup
from embcomp.training.stages.start_files import SMALL_FILE, long_tensors
from tests.helpers.joined_batches import batches_of_ranks
from tests.helpers.long import long_but
from tests.helpers.staged_methods import STAGED
from tests.helpers.training_cases import train_on_ranks, write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Please use DTensor")]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def staged_config(dataset: Path, method: str, *overrides: str) -> TrainConfig:
    case = STAGED[method]
    document = {
        "name": method,
        "seed": 3,
        "data": {
            "path": str(dataset),
            "batch_size": 32,
            "eval_batch_size": 32,
            "drop_last": True,
            "search_share": 0.25,
        },
        "tables": {"embedding_dim": 8, "method": case.method, "budget": case.budget},
        "model": {"name": "deepfm", "hidden_units": [8], "batch_norm": False},
        "train": {
            "epochs": 1,
            "log_every": 3,
            "checkpoint_every": 2,
            "keep_checkpoints": 9,
            "stages": case.stages,
        },
    }
    return parse_config(document, overrides)


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory):
    """Each method's whole run, made once: a worker that runs tests of several files may come back to this one."""
    runs = tmp_path_factory.mktemp("runs")
    done: dict[str, Path] = {}

    def get(method: str) -> Path:
        if method not in done:
            train(staged_config(dataset, method), runs=runs, quiet=True)
            done[method] = runs / method
        return done[method]

    return get


def life_of(run: Path) -> tuple[TrainConfig, DatasetInfo, StageSchedule, RunFolder]:
    folder = RunFolder(run)
    config = folder.config()
    info = DatasetInfo.load(config.data.path)
    return config, info, StageSchedule.of(config, info), folder


def start_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that a stage began with, whole."""
    small = safetensors.torch.load_file(folder / SMALL_FILE)
    return small | {name: rows.whole() for name, rows in long_tensors(folder).items()}


def weights_at(run: Path, index: int, step: int) -> dict[str, torch.Tensor]:
    return load_unsharded(RunContext.opened(run), index, step).model.state_dict()


def test_every_method_in_stages_is_under_test():
    configs = [config for cls in BACKENDS.values() for config in (cls(), cls(budget="50%"))]
    assert set(STAGED) == {config.name for config in configs if len(config.stages()) > 1}


@pytest.mark.parametrize("method", STAGED)
def test_the_stages_are_run_logged_and_reported_under_their_names(finished, method):
    run = finished(method)
    _config, _, schedule, folder = life_of(run)
    report = Report.load(run)
    assert [stage["name"] for stage in report.stages] == schedule.names
    for stage in report.stages:
        assert stage["wall_seconds"] >= stage["train_seconds"] > 0
    assert report.wall_seconds == sum(stage["wall_seconds"] for stage in report.stages)
    lines = folder.metrics.read_text().splitlines()
    logged = dict.fromkeys(json.loads(line)["stage"] for line in lines)
    assert list(logged) == [schedule.names[index] for index in schedule.trained]
    assert evaluate(run, "test", quiet=True).metrics.auc == report.test["auc"]


@pytest.mark.parametrize("method", STAGED)
def test_the_last_stage_leaves_what_the_report_and_the_plan_say(finished, method):
    run = finished(method)
    config, _info, schedule, _ = life_of(run)
    tables = load_model(run).tables
    served = count_bytes(tables.serving_tensors())
    assert Report.load(run).serve_bytes == served == tables.compact().footprint.serve_bytes
    found = plan_config(config, sizes_of_dataset(config.data.path), forms_of_run(run))
    assert sum(line.serve for line in found.lines()) == served
    planned = schedule.plan.footprint.serve_bytes
    assert (
        served <= planned
        if any(group.method.learns_size for group in schedule.staged)
        else served == planned
    )


@pytest.mark.parametrize("method", STAGED)
def test_a_finished_run_becomes_an_artefact_of_the_reported_bytes(finished, method, tmp_path):
    run = finished(method)
    found = export_run(run, tmp_path / "artefact")
    assert found.parity.max_error <= 1e-5
    assert found.saved.config.budget is None or found.saved.config.tables.bytes <= (
        found.saved.config.budget
    )
    measured = header_bytes(tmp_path / "artefact" / "model.safetensors")["tables"]
    assert measured == Report.load(run).serve_bytes
    narrow = export_run(run, tmp_path / "narrow", row_type="int8", tolerance=1)
    assert narrow.saved.config.tables.bytes < measured


@pytest.mark.parametrize("method", STAGED)
def test_a_stage_moves_what_it_says_and_nothing_else(finished, method):
    run = finished(method)
    _, _, schedule, folder = life_of(run)
    for index in schedule.trained:
        setup = StageSetup.of(schedule, index, folder)
        stage, steps = setup.stage, saved_steps(setup.folder.checkpoints)
        if len(steps) < 2:
            continue
        first, last = (weights_at(run, index, step) for step in (steps[0], steps[-1]))
        model = load_unsharded(RunContext.opened(run), index, steps[0])
        (owner,) = setup.owners
        prefix = setup.structure_prefix(owner, path_of(model.model, model.tables))
        learnt = stored_tensors(model.model, dict(model.model.named_parameters()))
        own = {name for name in learnt if name.startswith(prefix)}
        rows = {name for name in first if ".embedding_bags." in name and "first_order" not in name}
        network = learnt.keys() - own - rows
        network = {name for name in network if "first_order" not in name}
        for names, learns in (
            (rows, stage.rows),
            (network, stage.network),
            (own, stage.structure),
        ):
            moved = {name for name in names if not torch.equal(first[name], last[name])}
            assert moved == (names if learns else set()), (method, stage.name)


# One process imports everything; an attempt is a fork that may kill itself after a step of a stage.
ATTEMPTS = """
import os, sys
import torch
torch.set_num_threads(1)
from embcomp.config.train_config import load_config
from embcomp.training import api, loop
from embcomp.training.stages import folder_work, search_stage

def run(path, runs, kill):
    stage, _, step = kill.partition(":")
    number = int(step) if step.isdigit() else None
    train_step, evaluate = loop.Training._train_step, search_stage.StageSearch.evaluate
    write_piece, pieces = folder_work.write_piece, []
    def write_and_die(path, tensors, item):
        write_piece(path, tensors, item)
        pieces.extend([path] * path.parts[-4].endswith(f"-{stage}"))
        if step == f"piece{len(pieces)}":
            os.kill(os.getpid(), 9)
    def train_and_die(self, batches):
        train_step(self, batches)
        if self.stage.name == stage and self.state.step == number:
            os.kill(os.getpid(), 9)
    def evaluate_and_die(self, rows=None):
        if self._schedule.stages[self._index].name == stage and self.evaluations == number:
            os.kill(os.getpid(), 9)
        return evaluate(self, rows)
    loop.Training._train_step = train_and_die
    search_stage.StageSearch.evaluate = evaluate_and_die
    folder_work.write_piece = write_and_die
    api.train(load_config(path), runs=runs, quiet=True)
    os._exit(0)

for attempt in sys.argv[1:]:
    path, runs, kill = attempt.split("@", 2)
    child = os.fork()
    if child == 0:
        run(path, runs, kill)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def attempt(*attempts: tuple[Path, Path, str]) -> list[int]:
    command = [sys.executable, "-c", ATTEMPTS, *("@".join(map(str, each)) for each in attempts)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, check=True, timeout=280, stdout=subprocess.PIPE)
    return [int(code) for code in done.stdout.split()]


@pytest.mark.parametrize("method", long_but(["pq"], STAGED))
def test_a_run_killed_in_every_stage_ends_as_if_nothing_had_happened(
    dataset, finished, tmp_path, method
):
    whole = finished(method)
    config, _info, schedule, folder = life_of(whole)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    kills = []
    for index, stage in enumerate(schedule.stages):
        outcome = Report.load(whole).stages[index]
        if stage.kind == "search":
            if outcome["stopped"] not in ("0 evaluations", "1 evaluations"):
                kills.append(f"{stage.name}:2")
        elif index > schedule.trained[0]:
            kills.append(f"{stage.name}:piece5")
        if stage.kind == "train" and outcome["steps"] >= 3:
            kills.append(f"{stage.name}:3")
    codes = attempt(*((path, tmp_path, kill) for kill in [*kills, "none:0"]))
    assert codes == [-9] * len(kills) + [0]
    again = RunFolder(tmp_path / method)
    assert again.metrics.read_bytes() == folder.metrics.read_bytes()
    assert not [path for kind in ("work", "done-*", "failed-*") for path in again.path.rglob(kind)]
    for index in schedule.trained:
        setup, other = (StageSetup.of(schedule, index, f) for f in (folder, again))
        if setup.folder.start.exists():
            started, begun = (start_tensors(each.folder.start) for each in (setup, other))
            assert started.keys() == begun.keys()
            for name, tensor in begun.items():
                assert torch.equal(tensor, started[name]), (schedule.names[index], name)
        last = saved_steps(setup.folder.checkpoints)[-1]
        there = weights_at(tmp_path / method, index, last)
        for name, tensor in weights_at(whole, index, last).items():
            assert torch.equal(tensor, there[name]), (schedule.names[index], name)


@pytest.mark.parametrize("method", long_but(["pq", "dnis"], STAGED))
def test_ranks_train_every_stage_as_one_process_does(workers, dataset, tmp_path, method):
    ranks = STAGED[method].ranks
    config = staged_config(dataset, method, "train.sharding=row_wise")
    with batches_of_ranks(ranks):
        train(config, runs=tmp_path / "one", quiet=True)
    workers.run(ranks, train_on_ranks, config, tmp_path / "many")
    _, _, schedule, folder = life_of(tmp_path / "one" / method)
    for index in schedule.trained:
        place = folder.stage(index, schedule.names)
        step = saved_steps(place.checkpoints)[-1]
        one, many = (weights_at(tmp_path / way / method, index, step) for way in ("one", "many"))
        for name, tensor in one.items():
            torch.testing.assert_close(
                many[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_another_runs_weights_can_stand_for_the_first_stage(dataset, finished, tmp_path):
    method = next(name for name in STAGED if STAGED[name].starts_from_full)
    plain = ("name=full", "tables.method=full", "tables.budget=null", "train.stages={}")
    full = staged_config(dataset, method, *plain)
    train(full, runs=tmp_path, quiet=True)
    config = staged_config(dataset, method, f"train.start_from={tmp_path / 'full'}")
    report = train(config, runs=tmp_path, quiet=True)
    assert report.stages[0]["steps"] == 0
    assert str(tmp_path / "full") in report.stages[0]["stopped"]
    other = parse_config(
        {**config.model_dump(), "name": "other", "seed": 4}, ["model.hidden_units=[9]"]
    )
    with pytest.raises(ConfigError, match="another model"):
        train(other, runs=tmp_path, quiet=True)


CHANGED_FEATURES = {
    "reordered": (("C2", "C1", "C3"), "'C1' is where this one has 'C2'"),
    "inserted": (("C1", "A", "C2", "C3"), "A is in one of them only"),
    "appended": (("C1", "C2", "C3", "Z"), "Z is in one of them only"),
    "removed": (("C1", "C2"), "C3 is in one of them only|no table is called 'C3'"),
}


@pytest.mark.parametrize("change", CHANGED_FEATURES)
def test_another_runs_weights_stand_only_for_the_same_features(change, dataset, tmp_path):
    """A network takes features by their places, so also an order that tables would not mind."""
    names, complaint = CHANGED_FEATURES[change]
    shutil.copytree(dataset, tmp_path / "data")
    described = tmp_path / "data" / "dataset.json"
    document = json.loads(described.read_text())
    known = {feature["name"]: feature for feature in document["categorical"]}
    pattern = document["categorical"][0]
    document["categorical"] = [known.get(name) or {**pattern, "name": name} for name in names]
    described.write_text(json.dumps(document))
    for method in STAGED:
        source = RunFolder(tmp_path / method)
        plain = ("name=full", "tables.method=full", "tables.budget=null", "train.stages={}")
        source.create(staged_config(dataset, method, *plain))
        config = staged_config(tmp_path / "data", method, f"train.start_from={source.path}")
        with pytest.raises(ConfigError, match=complaint):
            train(config, runs=tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()


def test_checkpoints_of_another_format_are_refused(dataset, finished, tmp_path):
    method = next(iter(STAGED))
    shutil.copytree(finished(method), tmp_path / method)
    (tmp_path / method / "report.json").unlink()
    _, _, schedule, folder = life_of(tmp_path / method)
    place = folder.stage(schedule.trained[-1], schedule.names)
    state = checkpoint_folder(place.checkpoints, saved_steps(place.checkpoints)[-1]) / "state.json"
    content = json.loads(state.read_text())
    assert content.pop("format_version") == 2
    state.write_text(json.dumps(content))
    names = {file.name for file in state.parent.iterdir()}
    write_checksums(state.parent, names - {CHECKSUMS_FILE})
    place.done.unlink(missing_ok=True)
    for act in (
        lambda: train(folder.config(), runs=tmp_path, quiet=True),
        lambda: load_model(tmp_path / method),
        lambda: evaluate(tmp_path / method, quiet=True),
    ):
        with pytest.raises(CheckpointError, match="knew a table by its place .* train again"):
            act()


def test_a_stage_that_only_harms_hands_on_what_it_began_with(dataset, tmp_path):
    harm = "train.stages.codes.learning_rate=1000"
    config = staged_config(dataset, "pq", "train.monitor=log_loss", harm)
    report = train(config, runs=tmp_path, quiet=True)
    assert report.best_step == report.stages[-1]["keeps_step"] == 0
    lines = (tmp_path / "pq" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    valid = [each for each in logged if each["kind"] == "valid" and each["stage"] == "codes"]
    assert [each["step"] for each in valid] == [0, report.stages[-1]["steps"]]
    assert valid[0]["log_loss"] == report.valid["log_loss"] < valid[1]["log_loss"]
    begun = weights_at(tmp_path / "pq", len(report.stages) - 1, 0)
    for name, tensor in load_model(tmp_path / "pq").state_dict().items():
        assert torch.equal(tensor, begun[name]), name


def test_what_cannot_be_a_stage_is_refused_before_training(dataset, tmp_path):
    with pytest.raises(ConfigError, match="unknown stage 'retrian'"):
        staged_config(dataset, next(iter(STAGED)), "train.stages={retrian: {epochs: 1}}")
    plain = {
        "name": "plain",
        "data": {"path": str(dataset)},
        "tables": {"method": "full"},
        "model": "deepfm",
        "train": {"start_from": str(tmp_path)},
    }
    with pytest.raises(ConfigError, match="trained in one stage"):
        train(parse_config(plain), runs=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


def test_the_resolved_config_of_a_staged_run_reads_back_equal(finished, tmp_path):
    run = finished(next(iter(STAGED)))
    config = load_config(run / "config.yaml")
    assert config == RunFolder(run).config()
    assert read_stage_result(life_of(run)[3].stage(0, life_of(run)[2].names))[0].steps > 0


@pytest.mark.parametrize("method", ["pq", "lr2vq"])
def test_what_a_later_stage_misses_is_said_before_the_first(method, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # so that importing it fails
    config = staged_config(dataset, method, "tables.method.clustering=faiss")
    with pytest.raises(ConfigError, match=f"{method}: faiss was asked for .* install faiss-cpu"):
        train(config, runs=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())
