"""How long bags are is asked by feature, whatever its table is called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from embcomp.backends import PQ, QR, Full, Unified
from embcomp.collection.plan import Plan
from embcomp.planning.config_plan import ConfigPlan, TableSize
from embcomp.planning.placement import PlacementRequest
from embcomp.search.space import device_limits
from embcomp.search.space.device_limits import DeviceLimits, PlacementChecker
from embcomp.search.space.options import Option, Unit
from embcomp.tables.specs import TableSpec

TABLES = [
    TableSpec(name="users", num_embeddings=400, embedding_dim=8, feature_names=("user_id",)),
    TableSpec(
        name="it/ems#1", num_embeddings=600, embedding_dim=8, feature_names=("seen", "b#ought/#2")
    ),
]
LENGTHS = {"user_id": 1.0, "seen": 30.0, "b#ought/#2": 2.5}
SIZES = [
    TableSize(name=name, num_embeddings=1000, mean_length=length)
    for name, length in LENGTHS.items()
]


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        (Full(), 1),
        (QR(divisor=9), 2),
        (Unified(num_buckets=50, num_chunks=2), 2),
        (PQ(subvector_dim=2, num_codewords=8), 4),
    ],
)
def test_a_plan_knows_the_bags_of_a_feature_that_is_not_called_as_its_table(method, parts):
    plan = ConfigPlan(
        main=Plan(default=method).resolve(TABLES),
        first_order=None,
        optimizer="sgd",
        dense_rows=False,
        sizes=SIZES,
    )
    assert plan.pooling_factors() == {
        f"{table.name}/{feature}#{part}": LENGTHS[feature]
        for table in TABLES
        for feature in table.feature_names
        for part in range(parts)
    }


def test_a_search_knows_them_too(monkeypatch):
    asked = []

    def row_wise_bytes(shapes, query):
        asked.extend(shapes)
        return [(0,) * query.world_size for _ in shapes]

    monkeypatch.setattr(device_limits, "row_wise_bytes", row_wise_bytes)
    option = Option(Full(), "full", 0, ("full",))
    space = SimpleNamespace(
        sizes=SIZES,
        recipe_plan=SimpleNamespace(first_order=None),
        units=[Unit(table.name, (table,), (option,)) for table in TABLES],
    )
    costs = SimpleNamespace(additive=True, of=lambda candidate: SimpleNamespace(train=0))
    query = PlacementRequest(world_size=2, device_memory=10**9)
    limits = DeviceLimits(train=None, query=query, world_size=2)
    assert PlacementChecker(space, costs, limits).fits((0, 0))
    assert {shape[3] for shape in asked} == {(1.0,), (30.0, 2.5)}
