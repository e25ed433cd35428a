"""Every candidate is inside the limits, whatever is proposed, and uses the budget if it can."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from embcomp.errors import BudgetError
from embcomp.planning.placement import PlacementError, PlacementRequest, place, row_wise_bytes
from embcomp.search.samplers.baselines import power_law, starts, uniform
from embcomp.search.space.repair import USED
from tests.helpers.search_cases import WIDTHS, prepare, write_recipe

QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EVERY_METHOD = [
    {"method": "low_dim", "width": [1, 2, 4]},
    {"method": "hash", "ratio": [0.01, 0.1, 0.3], "collisionless": 0},
    {"method": "qr", "divisor": [2, 7, 20]},
    "full",
]
SHARED = [{"method": "unified", "num_buckets": [20, 100, 500]}, *WIDTHS]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("search_repair"))


@st.composite
def proposals(draw, units):
    return tuple(draw(st.integers(0, len(unit.options) - 1)) for unit in units)


@QUICK
@given(
    data=st.data(),
    rows=st.lists(st.integers(2, 100_000), min_size=1, max_size=8),
    share=st.integers(1, 100),
    choices=st.sampled_from([WIDTHS, EVERY_METHOD, SHARED]),
    tied=st.booleans(),
    fill=st.booleans(),
)
def test_every_candidate_is_within_the_budget(recipe, data, rows, share, choices, tied, fill):
    groups = [{"choices": choices, "tied": tied}]
    try:
        prepared = prepare(recipe, rows, budget=f"{share}%", groups=groups)
    except BudgetError as error:
        assert "the smallest takes" in str(error)
        return
    except ValueError as error:  # one tiny table that only full fits
        assert "nothing to search" in str(error)
        return
    space, repair = prepared.space, prepared.repair
    proposal = data.draw(proposals(space.units))
    candidate = repair(proposal, fill=fill)
    exact = space.plan(candidate).footprint.serve_bytes
    assert exact == repair.costs.of(candidate).serve <= prepared.budget
    assert repair(proposal, fill=fill) == candidate
    if not fill and repair.costs.of(proposal).serve <= prepared.budget:
        assert candidate == proposal


@QUICK
@given(
    data=st.data(),
    rows=st.lists(st.integers(2, 3000), min_size=2, max_size=4),
    share=st.integers(15, 95),
    choices=st.sampled_from([WIDTHS, EVERY_METHOD]),
)
def test_the_budget_is_used_where_the_options_allow_it(recipe, data, rows, share, choices):
    prepared = prepare(recipe, rows, budget=f"{share}%", groups=[{"choices": choices}])
    space, repair = prepared.space, prepared.repair
    every = itertools.product(*(range(len(unit.options)) for unit in space.units))
    sizes = [repair.costs.of(candidate).serve for candidate in every]
    best = max(size for size in sizes if size <= prepared.budget)
    used = repair.costs.of(repair(data.draw(proposals(space.units)))).serve
    assert used >= min(USED * prepared.budget, best * 0.999 - 8 * len(rows))


@QUICK
@given(
    data=st.data(),
    rows=st.lists(st.integers(100, 50_000), min_size=2, max_size=6),
    limit=st.integers(30, 120),
)
def test_training_bytes_of_a_device_are_kept_too(recipe, data, rows, limit):
    # Rows are trained in widths padded to four, so a limit may bind though the budget does not.
    most = sum(rows) * (4 + 4) * 4 * limit // 100
    try:
        prepared = prepare(recipe, rows, budget="60%", train_per_device=most)
    except PlacementError as error:
        assert "the lightest takes" in str(error)
        return
    candidate = prepared.repair(data.draw(proposals(prepared.space.units)))
    plan = prepared.space.config_plan(candidate)
    lines = (*plan.lines(), *plan.first_order_lines())
    assert sum(line.train for line in lines) <= most


def test_repair_keeps_how_tables_stand_to_each_other(recipe):
    repair = prepare(recipe, [1000] * 6, budget="27.1%").repair
    assert repair((3, 0, 0, 0, 0, 0)) == (3, 0, 0, 0, 0, 0)
    shrunk = repair((3, 3, 3, 1, 1, 1))
    assert min(shrunk[:3]) >= max(shrunk[3:])


def test_important_tables_give_way_last(recipe):
    rows = [1000] * 6
    plain = prepare(recipe, rows, budget="30%").repair
    careful = prepare(recipe, rows, budget="30%", importance={"C6": 8.0}).repair
    proposal = (3,) * 6
    assert careful(proposal)[5] > plain(proposal)[5]
    assert careful(proposal)[5] == max(careful(proposal))


def test_starts_use_the_budget_and_the_uniform_one_is_uniform(recipe):
    repair = prepare(recipe, [1000] * 8, budget="25%").repair
    assert uniform(repair) == (1,) * 8
    for candidate in starts(repair).values():
        assert USED * repair.budget <= repair.costs.of(candidate).serve <= repair.budget


def test_power_laws_give_small_tables_more(recipe):
    repair = prepare(recipe, [10, 1000, 100_000], budget="20%").repair
    shares = [
        unit.options[place].bytes / unit.full_bytes
        for unit, place in zip(repair.space.units, power_law(repair, 0.5))
    ]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]


TOPOLOGY = {"world_size": 4, "device": "cpu", "reserve": "0%"}


def with_memory(recipe, rows, memory, **changes):
    return prepare(recipe, rows, topology={**TOPOLOGY, "device_memory": memory}, **changes)


@pytest.mark.parametrize("memory", [400_000, 185_000, 165_000])
def test_candidates_are_placed_by_the_planner_or_repaired(recipe, memory):
    rows = [9000, 4000, 700, 30, 12]
    prepared = with_memory(recipe, rows, memory, budget="90%")
    repair = prepared.repair
    for proposal in [(3, 3, 3, 3, 3), (3, 0, 3, 0, 3), (0, 3, 0, 3, 0), (1, 1, 1, 1, 1)]:
        candidate = repair(proposal)
        placement = repair.devices.place(candidate)
        assert max(placement.bytes_per_rank()) <= memory


def test_tables_with_fewer_rows_than_ranks_stay_whole_on_tight_devices(recipe):
    # The large table must be split; the planner's uniform proposals exist for neither kind.
    rows = [90_000, 5, 3, 2]
    prepared = with_memory(recipe, rows, 1_000_000, budget="90%")
    devices = prepared.repair.devices
    candidate = prepared.repair((3, 3, 3, 3))
    asked = devices.asked
    assert devices.fits(candidate) and devices.asked == asked
    kinds = {(s.table, s.sharding) for s in devices.place(candidate).shards}
    assert {table for table, kind in kinds if kind == "row_wise"} == {"C1", "first_order_C1"} & {
        table for table, _ in kinds
    }
    assert all(kind == "table_wise" for table, kind in kinds if not table.endswith("C1"))


def test_too_little_memory_is_said_with_the_table_that_takes_most(recipe):
    with pytest.raises(PlacementError, match=r"4 x 20,000 bytes .* are for 'C1'"):
        with_memory(recipe, [9000, 4000], 20_000, budget="90%")


@settings(QUICK, max_examples=6)
@given(
    data=st.data(),
    rows=st.lists(st.integers(1, 20_000), min_size=1, max_size=6),
    tightness=st.floats(0.5, 2.0),
)
def test_what_is_answered_without_the_planner_is_what_it_answers(recipe, data, rows, tightness):
    free = prepare(recipe, rows, budget="100%")
    candidate = data.draw(proposals(free.space.units))
    query = PlacementRequest(world_size=4, device_memory=1 << 40, device="cpu")
    tables = [(n, -(-max(w, 4) // 4) * 4, 4, (1.0,)) for n, w in zip(rows, (8,) * len(rows))]
    needed = sum(each[0] for each in row_wise_bytes(tables, query))
    memory = max(1, int(needed * tightness))
    try:
        prepared = with_memory(recipe, rows, memory, budget="100%")
    except PlacementError:
        return
    devices = prepared.repair.devices
    asked = devices.asked
    answer = devices.fits(candidate)
    if devices.asked > asked:
        return  # the planner's own answer
    try:
        devices.place(candidate)
        planner = True
    except PlacementError:
        planner = False
    assert answer == planner


def test_bytes_of_rows_split_over_ranks_add_up_to_what_the_planner_counts(recipe):
    prepared = with_memory(recipe, [9000, 4000, 700], 10**7, budget="90%")
    query = prepared.repair.devices.limits.query
    assert query is not None
    alone = replace(query, sharding=("row_wise",))
    candidate = prepared.repair((3, 2, 1))
    plan = prepared.space.config_plan(candidate)
    shards = place(plan.on_meta(), replace(alone, pooling_factors=plan.pooling_factors()))
    (held,) = prepared.repair.devices._stages(candidate)
    added = [sum(each) for each in zip(*row_wise_bytes(held.signatures, query))]
    assert shards.bytes_per_rank() == added
