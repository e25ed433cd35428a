"""`plan`, a search and training ask one planner: what is accepted before training finds its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError
from embcomp.planning.config_plan import plan_config, sizes_of_dataset
from embcomp.planning.placement import PlacementError, PlacementRequest, place, smallest_memory
from embcomp.search.config.search_sections import TopologyConfig
from embcomp.search.space.device_limits import PlacementChecker, limits_of
from embcomp.tables.budget import RESERVE, reserved_bytes
from embcomp.tables.footprint import RowOptimizer, count_bytes
from embcomp.testing.check_data import plain_tables
from embcomp.training import train
from embcomp.training.build import build_model
from embcomp.training.distributed import sharding_plan as training_placement
from embcomp.training.distributed.process import Process
from embcomp.training.distributed.sharding_plan import make_sharder, plan_sharding
from embcomp.training.optim.optimizers import attach_fused_optimizer
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.schedule import StageSchedule
from tests.helpers.backends_under_test import CASES
from tests.helpers.long import long_but
from tests.helpers.search_cases import prepare, write_recipe
from tests.helpers.staged_methods import STAGED
from tests.helpers.training_cases import toy_config, write_dataset
from tests.training.test_stages import staged_config

RECIPES = sorted(
    path.stem
    for path in Path(__file__).parents[2].joinpath("configs").glob("*.yaml")
    if not path.stem.startswith(("search_", "benchmark_"))
)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Please use DTensor")]
ONCE = {
    "full": {"name": "full"},
    "hash": {"name": "hash", "ratio": 0.3, "collisionless": 0},
    "qr": {"name": "qr", "divisor": 4},
    "unified": {"name": "unified", "num_buckets": 40},
    "low_dim": {"name": "low_dim", "width": 3},
}


assert len(RECIPES) > 10, "recipes are read from the checkout"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("one_planner"))


def here(world_size):
    """The first of some ranks, none of which runs."""
    return Process(0, world_size, torch.device("cpu"))


@pytest.fixture
def devices_of(monkeypatch):
    """Make training see devices of so many bytes."""
    alone = SimpleNamespace(broadcast_object_list=lambda answer, src: None)
    monkeypatch.setattr(training_placement, "dist", alone)

    def set_memory(memory):
        monkeypatch.setattr(training_placement, "device_memory", lambda process: memory)

    return set_memory


def trained_forms(config, runs):
    """How the tables really were in every stage of a run."""
    train(config, runs=runs, quiet=True)
    info = DatasetInfo.load(config.data.path)
    schedule, folder = StageSchedule.of(config, info), RunFolder(runs / config.name)
    return [schedule.plan_of(i, folder.stage(i, schedule.names)) for i in schedule.trained]


def placed_by_training(config, form, process):
    info = DatasetInfo.load(config.data.path)
    unsharded = build_model(config, info, torch.device("meta"), form)
    rows = config.train.row_optimizer
    attach_fused_optimizer(unsharded.model, rows, process.device)
    return plan_sharding(
        unsharded.model,
        make_sharder(None),
        process,
        "auto",
        -(-config.data.batch_size // process.world_size),
        rows.name,
        unsharded.mean_lengths,
    )


def query_of(config, plan, world_size, memory):
    return PlacementRequest(
        world_size=world_size,
        device_memory=memory,
        device="cpu",
        optimizer=plan.optimizer,
        batch_size=-(-config.data.batch_size // world_size),
        reserved=reserved_bytes(RESERVE, memory),
        reserve=RESERVE,
        pooling_factors=plan.pooling_factors(),
    )


@pytest.mark.parametrize("method", long_but([*ONCE, "pq"], [*ONCE, *STAGED]))
def test_what_plan_accepts_training_places_in_every_stage(dataset, tmp_path, devices_of, method):
    if method in STAGED:
        config = staged_config(dataset, method)
        forms = trained_forms(config, tmp_path)
    else:
        config = toy_config(dataset, f"tables.method={ONCE[method]}")
        forms = [None]
    plan = plan_config(config, sizes_of_dataset(dataset))
    for world_size in (1, 2):
        tables, query = plan.on_meta(), query_of(config, plan, world_size, 1 << 24)
        place(tables, query)
        least = smallest_memory(tables, query, 1 << 18)
        assert least is not None
        for memory in (least, least + least // 50, 2 * least):
            place(plan.on_meta(), query_of(config, plan, world_size, memory))  # accepted
            devices_of(memory)
            for form in forms:
                assert placed_by_training(config, form, here(world_size)).plan


def test_what_does_not_fit_is_refused_by_plan_and_by_training_alike(dataset, devices_of):
    config = toy_config(dataset)
    plan = plan_config(config, sizes_of_dataset(dataset))
    with pytest.raises(PlacementError, match="do not fit on 2 x"):
        place(plan.on_meta(), query_of(config, plan, 2, 2000))
    devices_of(2000)
    with pytest.raises(
        ConfigError, match=r"do not fit on 2 x 2,000 bytes .*, 200 of each .* `embcomp plan`"
    ):
        placed_by_training(config, None, here(2))


def test_plan_keeps_what_training_keeps_unless_told_otherwise(tmp_path):
    words = CliRunner().invoke(app, ["plan", "--help"], terminal_width=200).output
    assert f"training keeps {RESERVE}" in " ".join(words.replace("│", " ").split())
    config, tables = tmp_path / "c.yaml", tmp_path / "t.yaml"
    config.write_text(
        "{name: c, data: {path: none, batch_size: 8}, model: fm, "
        "tables: {embedding_dim: 16, method: full}}"
    )
    tables.write_text("a: 10000")
    memory = str(10_000 * (16 + 1 + 4 + 1) * 4 * 21 // 20)  # rows, first-order weights, 5 % more
    arguments = ["plan", str(config), "--tables", str(tables), "--device-memory", memory]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "of each reserved" in result.output
    assert CliRunner().invoke(app, [*arguments, "--reserve", "0%"]).exit_code == 0


def on_meta(config):
    tables = [table.bag() for table in plain_tables(16)]
    return CompressedEmbeddingBagCollection(tables, config, device=torch.device("meta"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_every_method_is_placed_whatever_shape_its_parameters_have(case, optimizer: RowOptimizer):
    query = PlacementRequest(world_size=2, device_memory=1 << 24, optimizer=optimizer)
    placement = place(on_meta(CASES[case].config), query)
    assert max(placement.bytes_per_rank()) <= 1 << 24


@pytest.mark.parametrize("method", ["coded_table", "low_dim_kept", "sparse", "lr2vq"])
def test_what_lies_beside_the_rows_is_billed_to_every_device(method):
    tables = on_meta(CASES[method].config)
    dense = sum(count_bytes(dict(part.named_buffers())) for part in (tables.route, tables.combine))
    query = PlacementRequest(world_size=4, device_memory=1 << 24)
    placement = place(tables, query)
    assert dense > 50 and placement.beside >= dense - 8  # a flag or two is no tensor of the method
    assert all(total >= placement.beside for total in placement.bytes_per_rank())
    with pytest.raises(PlacementError, match=r"beside [\d,]+ bytes of codes"):
        place(on_meta(CASES[method].config), replace(query, device_memory=placement.beside + 8))


@pytest.mark.parametrize("world_size", ["1", "2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_placed(recipe, world_size, tmp_path):
    tables = tmp_path / "tables.yaml"
    tables.write_text("{C1: 5000, C2: {num_embeddings: 300, mean_length: 2.5}, C3: 7}")
    arguments = ["--device-memory", "1GiB", "--world-size", world_size, "--tables", str(tables)]
    result = CliRunner().invoke(app, ["plan", recipe, *arguments])
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output


def test_codes_count_as_trained_bytes_on_the_way_to_them(dataset):
    config = staged_config(dataset, "pq")
    plan = plan_config(config, sizes_of_dataset(dataset))
    stages = [
        place(stage, PlacementRequest(world_size=2, device_memory=1 << 24))
        for stage in plan.on_meta()
    ]
    assert [stage.beside > 0 for stage in stages] == [False, True]
    assert {s.table for s in stages[0].shards} != {s.table for s in stages[1].shards}


SEARCHED = {
    "pq": {"method": "pq", "subvector_dim": 2, "num_codewords": [4, 8]},
    "low_rank": {"method": "low_rank", "latent_dim": [1, 2]},
    "qr": {"method": "qr", "divisor": [2, 7]},
    "coded": {"method": "coded", "subvector_dim": 2, "num_codewords": [4, 8]},
    "sharded codes": {"method": "coded", "subvector_dim": 2, "num_codewords": [4, 8]},
}


@pytest.mark.parametrize("method", SEARCHED)
@pytest.mark.parametrize("tightness", [0.6, 0.9, 1.0, 1.1, 1.5])
def test_a_search_answers_as_plan_does(recipe, method, tightness):
    rows, group = [9000, 700, 60], [{"choices": [SEARCHED[method]], "tied": True}]
    free = prepare(recipe, rows, budget="100%", groups=group)
    candidate = tuple(0 for _ in free.space.units)
    needed = free.repair.costs.of(candidate).train // 2
    memory = int(needed * tightness)
    topology = {"world_size": 2, "device": "cpu", "reserve": "0%", "device_memory": memory}
    config = free.config.model_copy(update={"topology": TopologyConfig(**topology)})
    above = 1 if method == "sharded codes" else free.base.train.shard_codes_above
    training = free.base.train.model_copy(update={"shard_codes_above": above})
    limits = limits_of(config, free.base.model_copy(update={"train": training}), False)
    devices = PlacementChecker(free.space, free.repair.costs, limits)
    answer = devices.fits(candidate)
    try:
        devices.place(candidate)
        planner = True
    except PlacementError:
        planner = False
    assert answer == planner
