"""Several methods in stages in one run: each goes through its life, and the others wait or are done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from embcomp.config.train_config import TrainConfig, parse_config
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError
from embcomp.planning.config_plan import plan_config, sizes_of_dataset
from embcomp.tables.footprint import count_bytes
from embcomp.training import Report, evaluate, load_model, train
from embcomp.training.checkpoint import saved_steps
from embcomp.training.export.export import export_run
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.left_model import path_of
from embcomp.training.stages.loading import forms_of_run, load_unsharded
from embcomp.training.stages.other_run import check_other_run
from embcomp.training.stages.run_context import RunContext
from embcomp.training.stages.schedule import StageSchedule
from tests.helpers.staged_methods import STAGED
from tests.helpers.training_cases import write_dataset
from tests.training.test_stages import attempt

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Please use DTensor")]

PQ = {"name": "pq", "subvector_dim": 2, "num_codewords": 8}
LR2VQ = {**STAGED["lr2vq"].method, "latent_dim": 4}
OPTEMBED = {**STAGED["optembed"].method, "budget": "60%"}
DNIS = {**STAGED["dnis"].method, "budget": "40%"}
MATRYOSHKA = {**STAGED["matryoshka"].method, "budget": "60%"}

# C1 and C3 are stored by the first, C2 by the second.
PAIRS = {
    "lr2vq and optembed": (
        (LR2VQ, OPTEMBED),
        ["dense+supernet", "optembed.search", "optembed.retrain"]
        + ["lr2vq.quantize", "lr2vq.codes"],
    ),
    "dnis and pq": (
        (DNIS, PQ),
        ["dense+warm", "dnis.search", "dnis.retrain", "pq.codes"],
    ),
    "pq twice": (
        ({**PQ, "subvector_dim": 4}, PQ),
        ["dense", "pq@C1.codes", "pq@C2.codes"],
    ),
}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def config_of(dataset: Path, first: dict, second: dict, *overrides: str) -> TrainConfig:
    document = {
        "name": "pair",
        "seed": 3,
        "data": {
            "path": str(dataset),
            "batch_size": 32,
            "eval_batch_size": 128,
            "drop_last": True,
            "search_share": 0.25,
        },
        "tables": {"embedding_dim": 8, "method": first, "overrides": {"C2": second}},
        "model": {"name": "deepfm", "hidden_units": [8], "batch_norm": False},
        "train": {"max_steps": 3, "log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 9},
    }
    return parse_config(document, overrides)


def schedule_of(config: TrainConfig) -> StageSchedule:
    return StageSchedule.of(config, DatasetInfo.load(config.data.path))


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory):
    """Of each pair a finished run and its config."""
    runs = tmp_path_factory.mktemp("runs")
    done = {}
    for pair, (methods, _) in PAIRS.items():
        config = config_of(dataset, *methods)
        train(config, runs=runs / pair, quiet=True)
        done[pair] = (runs / pair / "pair", config)
    return done


@pytest.mark.parametrize("pair", PAIRS)
def test_every_method_goes_through_its_stages(finished, pair):
    (run, config), (_, names) = finished[pair], PAIRS[pair]
    report, schedule = Report.load(run), schedule_of(config)
    assert [stage["name"] for stage in report.stages] == schedule.names == names
    logged = [json.loads(x)["stage"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(logged)) == [names[index] for index in schedule.trained]
    assert evaluate(run, "test", quiet=True).metrics.auc == report.test["auc"]


@pytest.mark.parametrize("pair", PAIRS)
def test_each_method_keeps_its_bytes_and_an_artefact_answers_as_the_run(finished, pair, tmp_path):
    run, config = finished[pair]
    schedule, tables = schedule_of(config), load_model(run).tables
    served = count_bytes(tables.serving_tensors())
    assert Report.load(run).serve_bytes == served
    found = plan_config(config, sizes_of_dataset(config.data.path), forms_of_run(run))
    assert sum(line.serve for line in found.lines()) == served
    for group in schedule.staged:
        own = [line for line in found.lines() if line.tables[0].name in group.names]
        bytes_now = sum(line.serve for line in own)
        planned = group.method.footprint(group.tables).serve_bytes
        learns = group.method.learns_size
        assert bytes_now <= planned if learns else bytes_now == planned, group.label
    exported = export_run(run, tmp_path / "artefact")
    assert exported.parity.max_error <= 1e-5
    assert exported.saved.config.tables.bytes == served


@pytest.mark.long
def test_runs_killed_within_stages_and_between_them_end_the_same(finished, tmp_path):
    attempts, codes = [], []
    for pair, (_, config) in finished.items():
        path = tmp_path / f"{pair}.yaml"
        path.write_text(config.to_yaml())
        schedule = schedule_of(config)
        trained = [schedule.names[index] for index in schedule.trained]
        kills = [f"{trained[0]}:2", f"{trained[1]}:piece2", f"{trained[-1]}:1"]
        kills = kills if "optembed" in pair else kills[1:]
        attempts += [(path, tmp_path / pair, kill) for kill in [*kills, "none:0"]]
        codes += [-9] * len(kills) + [0]
    assert attempt(*attempts) == codes
    for pair, (run, _) in finished.items():
        again = tmp_path / pair / "pair"
        assert (again / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
        came = load_model(again).state_dict()
        for name, tensor in load_model(run).state_dict().items():
            assert torch.equal(tensor, came[name]), (pair, name)


def test_structure_rests_until_its_methods_turn_while_rows_go_on(dataset, tmp_path):
    config = config_of(dataset, DNIS, OPTEMBED)
    train(config, runs=tmp_path, quiet=True)
    run = RunContext.opened(tmp_path / "pair")
    optembed = next(g for g in run.schedule.staged if g.label == "optembed")
    moved = {}
    for index in run.schedule.trained:
        setup, steps = run.setup(index), saved_steps(run.place(index).checkpoints)
        states = [load_unsharded(run, index, step) for step in (steps[0], steps[-1])]
        assert len(steps) > 1
        path = path_of(states[0].model, states[0].tables)
        prefix = setup.structure_prefix(optembed, path)
        first, last = (each.model.state_dict() for each in states)
        found = {name for name in first if not torch.equal(first[name], last[name])}
        moved[setup.stage.name] = (
            any(name.startswith(prefix) for name in found),
            any(".embedding_bags.C2." in n and n.startswith(path) for n in found),
        )
    assert moved == {
        "supernet+warm": (True, True),
        "dnis.search": (False, True),
        "dnis.retrain": (False, True),
        "optembed.retrain": (False, True),  # by then its tables have no structure to learn
    }


def test_search_rows_are_held_out_until_the_last_method_has_looked(dataset):
    def held(first: dict, second: dict) -> dict[str, bool]:
        stages = schedule_of(config_of(dataset, first, second)).stages
        return {stage.name: stage.holds_out for stage in stages if stage.kind == "train"}

    assert held(DNIS, PQ) == {
        "dense+warm": True,
        "dnis.search": True,
        "dnis.retrain": False,
        "pq.codes": False,
    }
    assert held(DNIS, MATRYOSHKA) == {
        "nested+warm": True,
        "dnis.search": True,
        "dnis.retrain": True,
        "matryoshka.finetune": False,
    }
    assert not any(held({**PQ, "subvector_dim": 4}, PQ).values())


def test_methods_that_begin_the_network_afresh_come_before_those_that_go_on(dataset):
    names = schedule_of(config_of(dataset, PQ, OPTEMBED)).names
    assert names == ["dense+supernet", "optembed.search", "optembed.retrain", "pq.codes"]


@pytest.mark.parametrize("name", ["dense+supernet", "lr2vq.codes", "optembed.retrain"])
def test_stages_are_set_by_their_names_in_the_run(dataset, name):
    for config in (
        config_of(dataset, LR2VQ, OPTEMBED, f"train.stages={{{name}: {{max_steps: 2}}}}"),
        config_of(dataset, LR2VQ, OPTEMBED, f"train.stages.{name}.max_steps=2"),
    ):
        stages = {stage.name: stage.max_steps for stage in schedule_of(config).stages}
        assert [each for each in stages if stages[each] == 2] == [name]
        assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("name", ["codes", "dense", "optembed.codes", "pq.codes", "dense+codes"])
def test_other_stages_are_refused_with_those_that_there_are(dataset, name):
    with pytest.raises(ConfigError, match=f"unknown stage '{name.replace('+', '[+]')}'.*stages of"):
        config = config_of(dataset, LR2VQ, OPTEMBED, f"train.stages={{{name}: {{epochs: 1}}}}")
        schedule_of(config)


def test_tables_that_would_come_to_share_what_they_learnt_apart_are_refused(dataset):
    lr2vq = {**LR2VQ, "subvector_dim": 2, "codebooks": "all", "factored": False}
    alike = {**PQ, "codebooks": "all"}
    with pytest.raises(ConfigError, match="pq of 'C2'.* in equal settings.*another seed"):
        schedule_of(config_of(dataset, lr2vq, alike))
    assert len(schedule_of(config_of(dataset, lr2vq, {**alike, "seed": 5})).staged) == 2


def test_another_runs_full_tables_stand_for_a_first_stage_of_full_tables(dataset, tmp_path):
    plain = ("name=full", "train.max_steps=1")
    full = {"name": "full"}
    train(config_of(dataset, full, full, *plain), runs=tmp_path, quiet=True)
    start = f"train.start_from={tmp_path / 'full'}"

    def check(first: dict, second: dict) -> None:
        config = config_of(dataset, first, second, start)
        info = DatasetInfo.load(config.data.path)
        check_other_run(RunContext.of(config, info, RunFolder(tmp_path / "pair")))

    check(DNIS, PQ)
    with pytest.raises(ConfigError, match=r"other tables than the stage 'dense\+supernet'"):
        check(PQ, OPTEMBED)


@pytest.mark.parametrize("method", ["pq", "low_rank"])
def test_tables_that_nobody_compresses_are_handed_on_as_they_were_trained(
    dataset, tmp_path, method
):
    config = config_of(dataset, STAGED[method].method | {"sharing_groups": []}, {"name": "full"})
    report = train(config, runs=tmp_path, quiet=True)
    run = RunContext.opened(tmp_path / "pair")
    kept = load_unsharded(run, 0, report.stages[0]["keeps_step"])
    begun = load_unsharded(run, 1, 0)
    name = f"{path_of(kept.model, kept.tables)}.rows.embedding_bags.C2.weight"
    assert torch.equal(kept.model.state_dict()[name], begun.model.state_dict()[name])
