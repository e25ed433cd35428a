"""Runs that are interrupted, repeated, changed, or belong to someone else."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from embcomp.errors import CheckpointError, ConfigError, DataError, EmbcompError
from embcomp.training import Evaluation, Report, evaluate, load_model, train
from embcomp.training.checkpoint import checkpoint_folder, saved_steps
from tests.helpers.training_cases import toy_config, train_on_ranks, write_dataset

pytestmark = pytest.mark.slow

# Dropout draws random numbers, decay and plateau have a memory, evaluations fall inside epochs.
OVERRIDES = (
    "data.batch_size=16",
    "data.shuffle_buffer=64",
    "model={name: deepfm, hidden_units: [8], dropout: 0.3, batch_norm: true}",
    "train.epochs=2",
    "train.eval_every=7",
    "train.checkpoint_every=4",
    "train.log_every=5",
    "train.plateau={factor: 0.5}",
    "train.warmup_steps=6",
    "train.row_optimizer={name: adagrad, weight_decay: 0.01}",
)
# One process imports everything; a rank of an attempt is a fork that may kill itself after a step.
ATTEMPTS = """
import os, socket, sys
import torch
torch.set_num_threads(1)
from embcomp.config.train_config import load_config
from embcomp.training import api, loop

def run(rank, world_size, port, runs, kill_at):
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    step = loop.Training._train_step
    def train_step(self, batches):
        step(self, batches)
        if self.state.step == kill_at:
            os.kill(os.getpid(), 9)
    loop.Training._train_step = train_step
    api.train(load_config(path), runs=runs, quiet=True)
    os._exit(0)

path, world_size, *attempts = sys.argv[1:]
for attempt in attempts:
    runs, kill_at = attempt.split("@")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(int(world_size)):
        children.append(os.fork())
        if children[-1] == 0:
            run(rank, int(world_size), port, runs, int(kill_at))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(*set(codes), flush=True)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def attempt(world_size: int, config_path: Path, *attempts: tuple[Path, int]) -> list[int]:
    """Exit codes of runs, each in the given folder and killed after the given step (0: never)."""
    command = [sys.executable, "-c", ATTEMPTS, str(config_path), str(world_size)]
    command += [f"{runs}@{step}" for runs, step in attempts]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, check=True, timeout=240, stdout=subprocess.PIPE)
    return [int(code) for code in done.stdout.split()]


def everything(run: Path) -> dict:
    """All tensors of the last checkpoint, optimizers' states included, and the records' bytes."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    checkpoints = run / "checkpoints"
    last = checkpoint_folder(checkpoints, saved_steps(checkpoints)[-1])
    dcp_to_torch_save(str(last), str(run / "all.pt"))
    report = json.loads((run / "report.json").read_text())
    timed = {"samples_per_second", "train_seconds", "wall_seconds"}
    report["stages"] = [{k: v for k, v in s.items() if k not in timed} for s in report["stages"]]
    return {
        "tensors": torch.load(run / "all.pt", weights_only=False),
        "metrics": (run / "metrics.jsonl").read_bytes(),
        "report": {key: value for key, value in report.items() if key not in timed},
        "random": {
            path.name: torch.load(path, weights_only=False)["torch"]
            for path in last.glob("random-*.pt")
        },
    }


def differences(first, second, path="") -> list[str]:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return [d for key in first for d in differences(first[key], second[key], f"{path}.{key}")]
    same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    return [] if same else [path]


@pytest.mark.filterwarnings("ignore:Please use DTensor")
# Before the first checkpoint, between two, in the second epoch, and just before the end.
@pytest.mark.long
@pytest.mark.parametrize(("world_size", "steps"), [(1, (3, 10, 37)), (2, (27,))])
def test_a_run_killed_again_and_again_ends_bit_for_bit_as_if_nothing_had_happened(
    dataset, tmp_path, world_size, steps
):
    config_path = tmp_path / "config.yaml"
    config_path.write_text(toy_config(dataset, *OVERRIDES).to_yaml())
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    codes = attempt(
        world_size, config_path, (whole, 0), *((killed, step) for step in steps), (killed, 0)
    )
    assert codes == [0, *[-signal.SIGKILL] * len(steps), 0]
    expected, found = everything(whole / "toy"), everything(killed / "toy")
    assert differences(expected, found) == []
    assert "optim" in expected["tensors"] and len(expected["random"]) == world_size
    assert len(expected["metrics"].splitlines()) > 10


@pytest.mark.filterwarnings("ignore:Please use DTensor")
def test_stored_integers_go_on_bit_for_bit_on_two_ranks(dataset, tmp_path):
    """Their last update waits for the next step, and is written before a checkpoint."""
    overrides = (
        "tables.method={name: alpt, bits: 8}",
        "train.sharding=row_wise",
        "train.warmup_steps=6",
        "train.checkpoint_every=4",
        "train.max_steps=9",
    )
    config_path = tmp_path / "config.yaml"
    config_path.write_text(toy_config(dataset, *overrides).to_yaml())
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    codes = attempt(2, config_path, (whole, 0), (killed, 6), (killed, 0))
    assert codes == [0, -signal.SIGKILL, 0]
    expected = everything(whole / "toy")
    assert differences(expected, everything(killed / "toy")) == []
    updates = {k: int(v) for k, v in expected["tensors"]["model"].items() if "updates@" in k}
    assert set(updates.values()) == {9}


def test_a_finished_run_says_so_and_is_not_trained_again(dataset, tmp_path, capsys):
    config = toy_config(dataset, "train.max_steps=3")
    report = train(config, runs=tmp_path, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert train(config, runs=tmp_path) == report == Report.load(tmp_path / "toy")
    assert "is finished" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_changed_config_is_refused_and_the_keys_are_named(dataset, tmp_path):
    train(toy_config(dataset, "train.max_steps=2"), runs=tmp_path, quiet=True)
    changed = toy_config(dataset, "train.max_steps=3", "model.hidden_units=[9]")
    with pytest.raises(ConfigError) as error:
        train(changed, runs=tmp_path, quiet=True)
    assert "train.max_steps: 2 -> 3" in str(error.value)
    assert "model.hidden_units: [8] -> [9]" in str(error.value)
    assert "seed" not in str(error.value)


def test_another_dataset_under_the_same_path_is_refused(tmp_path):
    dataset = write_dataset(tmp_path / "data")
    config = toy_config(dataset, "train.max_steps=2")
    train(config, runs=tmp_path / "runs", quiet=True)
    text = (dataset / "dataset.json").read_text()
    (dataset / "dataset.json").write_text(text.replace('"toy"', '"toys"', 1))
    with pytest.raises(ConfigError, match="prepared anew"):
        train(config, runs=tmp_path / "runs", quiet=True)


def test_a_checkpoint_of_another_model_is_refused_and_the_difference_named(dataset, tmp_path):
    train(toy_config(dataset, "train.max_steps=2"), runs=tmp_path / "a", quiet=True)
    other = toy_config(dataset, "train.max_steps=2", "model.hidden_units=[9, 3]")
    train(other, runs=tmp_path / "b", quiet=True)
    mine, theirs = tmp_path / "b" / "toy", tmp_path / "a" / "toy"
    (mine / "report.json").unlink()
    (mine / "checkpoints").rename(mine / "old")
    (theirs / "checkpoints").rename(mine / "checkpoints")
    difference = r"another model: .*model\.dnn\.0\.weight is 8 x \d+ there and 9 x \d+ here"
    with pytest.raises(CheckpointError, match=difference):
        train(other, runs=tmp_path / "b", quiet=True)


def test_a_damaged_checkpoint_is_named(dataset, tmp_path):
    config = toy_config(dataset, "train.max_steps=2")
    train(config, runs=tmp_path, quiet=True)
    (tmp_path / "toy" / "report.json").unlink()
    checkpoint = checkpoint_folder(tmp_path / "toy" / "checkpoints", 2)
    (checkpoint / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(
        CheckpointError,
        match=r"step-0000000002 is not a readable checkpoint: .* goes on from its start",
    ):
        train(config, runs=tmp_path, quiet=True)


def test_a_truncated_checkpoint_is_named(dataset, tmp_path):
    config = toy_config(dataset, "train.max_steps=2")
    train(config, runs=tmp_path, quiet=True)
    (tmp_path / "toy" / "report.json").unlink()
    checkpoint = checkpoint_folder(tmp_path / "toy" / "checkpoints", 2)
    for part in checkpoint.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(
        CheckpointError, match=r"step-0000000002 could not be read: .* from its start"
    ):
        train(config, runs=tmp_path, quiet=True)


def test_a_full_disk_is_an_error_that_leaves_the_last_checkpoint(dataset, tmp_path, monkeypatch):
    config = toy_config(dataset, "train.max_steps=4", "train.checkpoint_every=2")
    calls = []

    def write_item(*args, **kwargs):
        calls.append(args)
        if len(calls) > written:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(*args, **kwargs)

    whole, written = filesystem._write_item, 10**9
    train(config, runs=tmp_path / "whole", quiet=True)
    monkeypatch.setattr(filesystem, "_write_item", write_item)
    train(config, runs=tmp_path / "counted", quiet=True)
    written, calls = len(calls) * 3 // 4, []  # in the middle of the second of two checkpoints
    with pytest.raises(
        CheckpointError, match=r"step-0000000004 could not be written.*No space.* free"
    ):
        train(config, runs=tmp_path / "full", quiet=True)
    assert saved_steps(tmp_path / "full" / "toy" / "checkpoints") == [2]
    assert not list((tmp_path / "full" / "toy" / "checkpoints").glob(".step-*"))
    monkeypatch.setattr(filesystem, "_write_item", whole)
    train(config, runs=tmp_path / "full", quiet=True)
    metrics = [
        (tmp_path / runs / "toy" / "metrics.jsonl").read_bytes() for runs in ("full", "whole")
    ]
    assert metrics[0] == metrics[1]


def test_a_half_written_checkpoint_is_no_checkpoint(dataset, tmp_path):
    config = toy_config(dataset, "train.max_steps=4", "train.checkpoint_every=2")
    train(config, runs=tmp_path / "runs", quiet=True)
    (tmp_path / "runs" / "toy" / "checkpoints" / ".step-0000000099.tmp").mkdir()
    assert saved_steps(tmp_path / "runs" / "toy" / "checkpoints") == [2, 4]


def test_only_the_latest_checkpoints_and_the_best_stay(dataset, tmp_path):
    config = toy_config(
        dataset,
        "train.checkpoint_every=1",
        "train.eval_every=3",
        "train.min_delta=1",  # the first evaluation stays the best
        "train.keep_checkpoints=2",
    )
    report = train(config, runs=tmp_path, quiet=True)
    assert report.best_step == 3 and report.steps == 10
    assert saved_steps(tmp_path / "toy" / "checkpoints") == [3, 9, 10]
    records = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").open()]
    best = next(r for r in records if r["kind"] == "valid" and r["step"] == 3)
    assert report.valid == {key: best[key] for key in report.valid}
    again = evaluate(tmp_path / "toy", "valid", quiet=True)
    assert again.metrics.auc == best["auc"]


def test_two_ranks_checkpoint_loads_on_one_and_on_four(workers, dataset, tmp_path):
    options = ("train.sharding=row_wise", "train.checkpoint_every=4", "train.eval_every=100")
    config = toy_config(dataset, *options)
    workers.run(2, train_on_ranks, config, tmp_path)
    run = tmp_path / "toy"
    on_two = load_model(run).state_dict()
    expected = evaluate(run, "valid", quiet=True)  # on one rank
    for found in workers.run(4, evaluate_quietly, run):
        assert found.unseen_rate_by_feature == expected.unseen_rate_by_feature
        assert found.metrics.rows == expected.metrics.rows == 75
        assert found.metrics.log_loss == pytest.approx(expected.metrics.log_loss, abs=1e-6)
    # Take away the end of the run, and let one and then four ranks finish it.
    for world_size in (1, 4):
        (run / "report.json").unlink()
        last = saved_steps(run / "checkpoints")[-1]
        checkpoint_folder(run / "checkpoints", last).rename(run / f"kept-{world_size}")
        if world_size == 1:
            train(config, runs=tmp_path, quiet=True)
        else:
            workers.run(4, train_on_ranks, config, tmp_path)
        assert json.loads((run / "report.json").read_text())["world_size"] == world_size
        weights = load_model(run).state_dict()
        # Two of ten steps ran on other ranks, on the same rows.
        assert all(torch.allclose(weights[key], value, atol=1e-4) for key, value in on_two.items())


def evaluate_quietly(run: Path) -> Evaluation:
    return evaluate(run, "valid", quiet=True)


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        (("train.row_optimizer.name=adam",), ConfigError, "mode: dense"),
        (("train.device=cuda",), ConfigError, "no CUDA device"),
        (("tables.overrides={C9: full}",), ConfigError, "C9"),
        (("data.path=/nowhere",), DataError, "not a prepared dataset"),
        (("train.dense_optimizer={name: sgd, learning_rate: 1e30}",), EmbcompError, "clip_norm"),
        (
            ("data.batch_size=20", "model.batch_norm=true"),
            ConfigError,
            "a last batch of one row",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_way_out(dataset, tmp_path, overrides, error, text):
    if "cuda" in overrides[0] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(error, match=text):
        train(toy_config(dataset, *overrides), runs=tmp_path, quiet=True)


def test_evaluating_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(EmbcompError, match="not a run folder"):
        evaluate(tmp_path, quiet=True)
