"""Every method has a place for all of its life: on many devices, for every recipe, as training splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from embcomp.config.train_config import load_config
from embcomp.planning.config_plan import TableSize, plan_config
from embcomp.planning.placement import PlacementRequest, place_stages
from embcomp.planning.proposers import proposers

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path
    for path in ROOT.joinpath("configs").glob("*.yaml")
    if not path.stem.startswith(("search_", "benchmark_"))
)
GIB = 1 << 30
LIVES = {  # codes of more bytes a row would have to lie on each device
    "full": (None, ["full"]),
    "hash": ("10%", ["hash"]),
    "qr": ("10%", ["qr"]),
    "unified": ("10%", ["unified"]),
    "low_dim": ("10%", ["low_dim"]),
    "{name: low_rank, bias: true}": ("10%", ["full", "low_rank"]),
    "lr2vq": ("5%", ["full", "low_rank", "lr2vq", "coded"]),
    "pq": ("5%", ["full", "coded"]),
    "optembed": ("10%", ["optembed", "low_dim"]),
    "autodim": ("20%", ["autodim", "low_dim"]),
    "matryoshka": ("10%", ["matryoshka", "low_dim"]),
    "dnis": ("10%", ["full", "dnis_search", "blocks"]),
    "{name: dnis, structure: element}": ("5%", ["full", "dnis_search", "sparse"]),
}
assert len(RECIPES) > 10, "recipes are read from the checkout"
pytestmark = pytest.mark.slow


def query(plan, world_size, memory, **more):
    return PlacementRequest(
        world_size=world_size,
        device_memory=memory,
        optimizer=plan.optimizer,
        batch_size=4096,
        reserved=memory // 10,
        pooling_factors=plan.pooling_factors(),
        **more,
    )


@pytest.mark.parametrize("method", LIVES)
def test_a_billion_rows_have_a_place_in_every_form(tmp_path, method):
    (tmp_path / "c.yaml").write_text(
        "{name: big, data: {path: none}, model: dlrm, tables: {embedding_dim: 64, method: full}}"
    )
    budget, forms = LIVES[method]
    overrides = [f"tables.method={method}"] + ([f"tables.budget={budget}"] if budget else [])
    sizes = [TableSize(name="C0", num_embeddings=10**9)]
    sizes += [TableSize(name=f"C{n}", num_embeddings=10**8) for n in (1, 2, 3)]
    plan = plan_config(load_config(tmp_path / "c.yaml", overrides), sizes)
    assert plan.stage_names() == forms
    placements = place_stages(plan.on_meta(), query(plan, 16, 80 * GIB))
    for name, placement in zip(forms, placements):
        assert max(placement.bytes_per_rank()) <= 72 * GIB
        # A rank's chunk of codes or pointers, which one that held them all would have 16 times.
        beside = {"coded": 2 * GIB / 16, "sparse": 4 * GIB / 16, "low_dim": 0, "lr2vq": 1 << 10}
        assert placement.beside >= beside.get(name, 0)
        if name in ("coded", "sparse"):
            assert placement.beside_rows.tables == ("C0", "C1", "C2", "C3")
            assert placement.beside < 2 * GIB
        runs = placement.equal_ranks()
        assert [n for first, last in runs for n in range(first, last + 1)] == list(range(16))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_place(recipe):
    config = load_config(recipe)
    names = dict.fromkeys([f"C{n}" for n in range(1, 5)])
    names |= dict.fromkeys([*config.tables.overrides, *config.tables.row_types])
    sizes = [TableSize(name=name, num_embeddings=5000) for name in names if name != "default"]
    plan = plan_config(config, sizes)
    if not plan.dense_rows:
        assert place_stages(plan.on_meta(), query(plan, 2, GIB))


@pytest.mark.parametrize("sharding", ["column_wise", "row_wise", "table_wise"])
def test_a_plan_splits_as_training_does(tmp_path, sharding):
    (tmp_path / "c.yaml").write_text(
        "{name: c, data: {path: none}, model: dlrm, tables: {embedding_dim: 16, method: optembed}}"
    )
    sizes = [TableSize(name="C0", num_embeddings=1000), TableSize(name="C1", num_embeddings=5)]
    plan = plan_config(load_config(tmp_path / "c.yaml"), sizes)
    (first, *_) = place_stages(plan.on_meta(), query(plan, 4, GIB, sharding=(sharding,)))
    shapes = {(shard.rows, shard.columns) for shard in first.shards if shard.table == "C0"}
    assert (
        shapes
        == {
            "column_wise": {(1000, 4)},
            "row_wise": {(250, 16)},
            "table_wise": {(1000, 16)},
        }[sharding]
    )


def test_greedy_proposals_are_bounded_where_options_are_many():
    class Options(list):
        """So many, and none that is looked at."""

        def __len__(self):
            return 600

    for proposer in proposers()[1:3]:
        proposer._inner.propose = lambda: ["something"]
        proposer._inner.feedback = lambda *told: None
        proposer.load(Options())
        count = 0
        while proposer.propose():
            proposer.feedback(True)
            count += 1
        assert count == 20
