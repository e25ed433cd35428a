"""Whole runs whose codes, bitmaps and pointers are sharded: hand-overs, checkpoints, reports, artefacts."""

from __future__ import annotations

import pytest
import torch

from embcomp.config.train_config import parse_config
from embcomp.errors import ConfigError
from embcomp.layers.shardable_buffers import shardable
from embcomp.training import Report, evaluate, load_model, train
from embcomp.training.checkpoint import checkpoint_folder, saved_steps
from embcomp.training.export.export import export_run
from embcomp.training.loop import Training
from embcomp.training.run_folder import RunFolder
from tests.helpers.long import long_but
from tests.helpers.training_cases import train_on_ranks, write_recipe_dataset
from tests.training.test_several_staged import DNIS, OPTEMBED, PQ

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Please use DTensor")]

FEW = {"generations": 0, "population": 1}
SHARDED = "train.shard_codes_above=1"


def config_of(dataset, *overrides):
    """`pq`, `optembed` and `dnis` in one run, which end in codes, in bitmaps and in pointers."""
    document = {
        "name": "run",
        "seed": 3,
        "data": {
            "path": str(dataset),
            "batch_size": 32,
            "eval_batch_size": 128,
            "drop_last": True,
            "search_share": 0.25,
        },
        "tables": {
            "embedding_dim": 8,
            "method": PQ,
            "overrides": {"C1": OPTEMBED | FEW, "C2": {**DNIS, "structure": "element"}},
        },
        "model": {"name": "deepfm", "hidden_units": [8], "batch_norm": False},
        "train": {"max_steps": 2, "log_every": 1, "checkpoint_every": 1, "keep_checkpoints": 9},
    }
    return parse_config(document, overrides)


def train_and_measure(config, runs):
    """For a pool of workers: trains, and what each route of the last stage holds on this rank."""
    held = []
    begin = Training._begin

    def noted(self):
        found = begin(self)
        for part in shardable(self.sharded):
            own = sum(b.nbytes for name, b in part.named_buffers() if name != "filled")
            held.append((part.exchange is not None, type(part).__name__, own))
        return found

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Training, "_begin", noted)
        train(config, runs=runs, quiet=True)
    return held


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_recipe_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def runs(workers, dataset, tmp_path_factory):
    """The same run with whole and with sharded codes, and what its ranks held."""
    folder = tmp_path_factory.mktemp("runs")
    held = {
        name: workers.run(2, train_and_measure, config_of(dataset, *overrides), folder / name)
        for name, overrides in (("whole", ()), ("sharded", (SHARDED,)))
    }
    return folder, held


def test_a_run_ends_bit_for_bit_as_with_whole_codes(runs):
    folder, _ = runs
    whole, sharded = (folder / name / "run" for name in ("whole", "sharded"))
    assert (whole / "metrics.jsonl").read_bytes() == (sharded / "metrics.jsonl").read_bytes()
    wanted, found = (load_model(run).state_dict() for run in (whole, sharded))
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {name.split("@")[0].rpartition(".")[2] for name in wanted if ".routes." in name} == {
        "codes",
        "words",
        "counts",
        "pointers",
        "columns",
    }


def test_each_rank_holds_its_share_in_every_stage(runs):
    _, held = runs
    assert {kind for _, kind, _ in held["sharded"][0]} == {
        "CodedRoute",
        "PrunedRoute",
        "SparseRoute",
    }
    for whole, first, second in zip(held["whole"][0], *held["sharded"]):
        (was_sharded, kind, all_of_it), (is_sharded, same, own) = whole, first
        assert (was_sharded, is_sharded, kind) == (False, True, same)
        assert own == second[2] and all_of_it // 2 <= own <= all_of_it // 2 + 64, kind


def evaluate_quietly(run):
    return evaluate(run, "test", quiet=True)


def test_it_is_evaluated_and_exported(runs, workers, tmp_path):
    run = runs[0] / "sharded" / "run"
    found = [each.metrics.auc for each in workers.run(2, evaluate_quietly, run)]
    assert found == [Report.load(run).test["auc"]] * 2
    assert export_run(run, tmp_path / "artefact").parity.max_error <= 1e-5


def test_a_run_goes_on_with_other_ranks_and_another_setting(runs, dataset, workers, tmp_path):
    run = runs[0] / "sharded" / "run"
    wanted = load_model(run).state_dict()
    folder = RunFolder(run)
    names = [stage["name"] for stage in Report.load(run).stages]
    last = folder.stage(len(names) - 1, names)
    for ranks, overrides in ((4, (SHARDED,)), (1, ())):
        (run / "report.json").unlink()
        step = saved_steps(last.checkpoints)[-1]
        checkpoint_folder(last.checkpoints, step).rename(tmp_path / f"taken-{ranks}")
        config = config_of(dataset, *overrides)
        if ranks == 1:
            train(config, runs=run.parent, quiet=True)
        else:
            workers.run(ranks, train_on_ranks, config, run.parent)
        assert saved_steps(last.checkpoints)[-1] == step
        found = load_model(run).state_dict()
        for name, value in wanted.items():
            if ".routes." in name:
                assert torch.equal(found[name], value), name
            else:
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def full_run(dataset, tmp_path_factory):
    """A run of full tables, and what one process makes of it that begins `pq` and `dnis` with it."""
    folder = tmp_path_factory.mktemp("full")
    full = ("name=full", "tables.method=full", "tables.overrides={}")
    train(config_of(dataset, *full), runs=folder, quiet=True)
    train(started_from(dataset, folder), runs=folder / "one", quiet=True)
    return folder


def started_from(dataset, folder, *overrides):
    elements = (
        "tables.overrides={C2: {name: dnis, structure: element, budget: 40%, quantiles: [0.5]}}"
    )
    start = f"train.start_from={folder / 'full'}"
    return config_of(dataset, elements, start, "train.sharding=row_wise", *overrides)


@pytest.mark.parametrize("ranks", long_but([2], [2, 4]))
def test_ranks_start_from_another_run_as_one_process_does(workers, dataset, full_run, ranks):
    place = full_run / f"on-{ranks}"
    workers.run(ranks, train_on_ranks, started_from(dataset, full_run, SHARDED), place)
    wanted, found = (load_model(each / "run").state_dict() for each in (full_run / "one", place))
    codes = [name for name in wanted if ".routes." in name]
    kinds = {name.split("@")[0].rpartition(".")[2] for name in codes}
    assert kinds == {"codes", "pointers", "columns"}
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        if ".codes@" in name:
            assert torch.equal(found[name], value), name
        elif name not in codes:
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_the_size_is_a_number_of_bytes(dataset):
    assert config_of(dataset).train.shard_codes_above == "64MiB"
    for wrong in ("10%", "0", "-1", "much"):
        with pytest.raises(ConfigError, match="shard_codes_above: expected .* number of bytes"):
            config_of(dataset, f"train.shard_codes_above={wrong}")
