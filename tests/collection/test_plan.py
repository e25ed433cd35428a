"""Plans: which method holds which table, and whether their bytes stay within what was asked."""

from __future__ import annotations

import time
import tracemalloc

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from embcomp.backends import QR, Full, Hash, Unified
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.plan import Plan
from embcomp.errors import BudgetError, ConfigError
from embcomp.tables.specs import TableSpec


def specs(*rows, dim=8):
    return [
        TableSpec(
            name=f"t{n}", num_embeddings=count, embedding_dim=dim, feature_names=(f"f{n}",), index=n
        )
        for n, count in enumerate(rows)
    ]


def test_short_forms():
    tables = specs(500, 600)
    assert Plan.of(None).resolve(tables).methods == {"t0": Full(), "t1": Full()}
    assert Plan.of(Hash(num_buckets=9)).resolve(tables).methods == {
        "t0": Hash(num_buckets=9),
        "t1": Hash(num_buckets=9),
    }
    assert Plan.of({"t1": QR(divisor=9)}).resolve(tables).methods == {
        "t0": Full(),
        "t1": QR(divisor=9),
    }
    plan = Plan(default=Full())
    assert Plan.of(plan) is plan


def test_tables_with_equal_methods_share_a_group():
    tables = specs(500, 600, 700)
    plan = Plan(default=Unified(num_buckets=50), overrides={"t1": Hash(num_buckets=9)})
    groups = [
        (config.name, [t.name for t in group]) for config, group in plan.resolve(tables).groups
    ]
    assert groups == [("unified", ["t0", "t2"]), ("hash", ["t1"])]


def test_an_override_that_equals_the_default_shares_its_rows():
    tables = specs(500, 600)
    plan = Plan(default=Unified(num_buckets=50), overrides={"t1": Unified(num_buckets=50)})
    assert plan.resolve(tables).footprint.serve_bytes == 50 * 4 * 4


def test_overrides_with_a_budget_share_it():
    tables = specs(500, 600, 700)
    method = Hash(budget="10%", collisionless=0)
    resolved = Plan.of({"t0": method, "t1": method}).resolve(tables)
    shared = resolved.methods["t0"].footprint(tables[:2]).serve_bytes
    assert resolved.methods["t0"] == resolved.methods["t1"]
    assert 0.09 < shared / (1100 * 32) <= 0.10
    assert resolved.methods["t2"] == Full()


@pytest.mark.parametrize("method", [Hash, QR, Unified])
@pytest.mark.parametrize("budget", ["10%", "20%", 40_000])
def test_a_methods_budget_is_met_closely(method, budget):
    tables = specs(5000, 9000, 40)
    resolved = Plan.of(method(budget=budget)).resolve(tables)
    allowed = {"10%": 44_928, "20%": 89_856}.get(budget, budget)
    assert 0.98 * allowed < resolved.footprint.serve_bytes <= allowed
    assert all(config.budget is None for config in resolved.methods.values())


def test_the_plans_budget_is_what_overrides_leave():
    tables = specs(5000, 9000, 40)
    plan = Plan(
        default=Unified(),
        overrides={"t2": Full(), "t0": Hash(ratio=0.1)},
        budget="25%",
    )
    resolved = plan.resolve(tables)
    assert resolved.methods["t2"] == Full()
    assert resolved.methods["t0"] == Hash(ratio=0.1)
    allowed = (5000 + 9000 + 40) * 32 // 4
    assert allowed - 16 < resolved.footprint.serve_bytes <= allowed
    assert resolved.compression_ratio == pytest.approx(4, rel=1e-3)


def test_tables_stay_full_where_the_budget_allows_them_all():
    tables = specs(500, 600)
    for budget in ("100%", 1100 * 32, "1GiB"):
        for plan in (Plan.of(Unified(budget=budget)), Plan(default=Hash(), budget=budget)):
            resolved = plan.resolve(tables)
            assert [config.name for config in resolved.methods.values()] == ["full", "full"]
            assert resolved.compression_ratio == 1
    below = Plan.of(Hash(budget=1100 * 32 - 1)).resolve(tables)
    assert below.footprint.serve_bytes < 1100 * 32


def test_tables_that_would_not_shrink_become_full():
    resolved = Plan.of(Hash(num_buckets=550, collisionless=0)).resolve(specs(500, 600))
    assert resolved.methods == {"t0": Full(), "t1": Hash(num_buckets=550, collisionless=0)}


def test_unknown_overrides_are_refused_with_the_choices():
    with pytest.raises(ConfigError, match="no table is called 'C9', 't9'; the tables are t0, t1"):
        Plan.of({"t9": Full(), "t0": Full(), "C9": Full()}).resolve(specs(5, 6))


def test_no_tables_are_refused():
    with pytest.raises(ConfigError, match="at least one table, got none"):
        Plan().resolve([])


def test_overrides_above_the_budget_are_refused():
    tables = specs(500, 600)
    with pytest.raises(BudgetError, match="overrides take 16,000 bytes.*budget of 3,520"):
        Plan(default=Hash(), overrides={"t0": Full()}, budget="10%").resolve(tables)
    everything = {"t0": Full(), "t1": Hash(num_buckets=9)}
    with pytest.raises(BudgetError, match="over the budget of 3,520 bytes"):
        Plan(overrides=everything, budget="10%").resolve(tables)


def test_a_full_default_over_the_budget_names_its_floor():
    with pytest.raises(BudgetError, match="smallest full reaches is 35,200 bytes"):
        Plan(budget="10%").resolve(specs(500, 600))


def test_bad_budgets_are_refused_when_the_plan_is_made():
    with pytest.raises(ConfigError, match="budget: expected"):
        Plan(budget="a lot")


@pytest.mark.parametrize(
    "plan",
    [
        Plan(default=Hash(), budget="1%"),
        Plan(default=QR(), budget="1%"),
        Plan(default=QR(), budget="45%"),
        Plan(default=Unified(), budget="64MiB"),
        Plan(default=Unified(), budget="10%", overrides={"t0": QR(budget="5%")}),
    ],
    ids=str,
)
def test_a_billion_rows_are_planned_at_once_and_without_memory(plan):
    tables = specs(10**9, 4 * 10**8, *[1000 * 3**n for n in range(12)], dim=64)
    tracemalloc.start()
    before = time.process_time()
    resolved = plan.resolve(tables)
    assert resolved.footprint.serve_bytes < resolved.full_bytes / 2
    assert time.process_time() - before < 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_a_billion_rows_on_meta_are_built_at_once():
    tables = [
        EmbeddingBagConfig(
            name=f"t{n}", num_embeddings=10**9, embedding_dim=64, feature_names=[f"f{n}"]
        )
        for n in range(3)
    ]
    before = time.process_time()
    built = CompressedEmbeddingBagCollection(
        tables, Plan(default=Unified(), budget="10%"), device=torch.device("meta")
    )
    assert time.process_time() - before < 1
    (weight,) = built.rows.parameters()
    assert weight.is_meta
    assert 0 <= 3 * 10**9 * 64 * 4 // 10 - built.footprint.serve_bytes < 32 * 4
