"""Budgets: as written, as met, and as refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from embcomp.backends import QR, Full, Hash, Unified
from embcomp.collection.plan import Plan
from embcomp.errors import BudgetError, ConfigError
from embcomp.tables.budget import format_bytes, largest_int, parse_budget
from embcomp.tables.specs import TableSpec


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("7", 7),
        ("7B", 7),
        ("64MiB", 64 * 2**20),
        ("64 mib", 64 * 2**20),
        ("1.5 GB", 1_500_000_000),
        ("2TiB", 2**41),
        ("0.5KiB", 512),
    ],
)
def test_sizes(text, size):
    assert parse_budget(text) == size


def test_shares_are_exact():
    assert parse_budget("10%", full_bytes=10**18 + 9) == 10**17
    assert parse_budget("0.1 %", full_bytes=5000) == 5
    assert parse_budget("100%", full_bytes=12345) == 12345


@pytest.mark.parametrize(
    "budget", [0, -5, "0", "0%", "-3MiB", "64 MiBs", "", "ten", "1e6", "%", True, 2.5, None, "0.1B"]
)
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(ConfigError, match=f"budget: expected.*got {re.escape(repr(budget))}"):
        parse_budget(budget)


def test_bytes_for_people():
    assert [format_bytes(n) for n in (17, 2048, 64 * 2**20, 3 * 2**40)] == [
        "17 B",
        "2.0 KiB",
        "64.0 MiB",
        "3.0 TiB",
    ]


@given(st.integers(-5, 300), st.integers(1, 100), st.integers(0, 200))
def test_largest_int_equals_a_scan(limit, low, more):
    wanted = [n for n in range(low, low + more + 1) if n <= limit]
    found = largest_int(lambda n: n <= limit, low, low + more)
    assert found == (wanted[-1] if wanted else None)


TABLES = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 20)), min_size=1, max_size=5).map(
    lambda sizes: [
        TableSpec(name=f"t{n}", num_embeddings=rows, embedding_dim=dim, feature_names=(f"f{n}",))
        for n, (rows, dim) in enumerate(sizes)
    ]
)
METHODS = st.sampled_from(
    [
        Full(),
        Hash(num_buckets=1),
        Hash(num_buckets=1, collisionless=0),
        QR(divisor=1),
        QR(divisor=1, combine="add"),
        QR(divisor=1, combine="concat"),
        Unified(num_buckets=1),
        Unified(num_buckets=1, collisionless=200),
        Unified(num_buckets=1, num_chunks=3, num_tables=2, chunks={"t0": 7}),
    ]
)


def valid(method, tables):
    """Configurations that make no sense for the tables are not this file's business."""
    try:
        method.footprint(tables)
    except ConfigError:
        return False
    return True


def larger(config, tables, size):
    """Serving bytes of every configuration that might lie next above one of `size` bytes."""
    if isinstance(config, Full):
        return []
    if isinstance(config, Unified):
        return [config.with_size(num_buckets=config.num_buckets + 1)]
    if isinstance(config, QR):
        most = max(table.num_embeddings for table in tables)
        return [config.with_size(divisor=divisor) for divisor in range(1, most + 1)]
    # A table's rows change where the ratio passes a multiple of one over its length.
    ratios = {
        min(1.0, (config.rows(table) + 1) / table.num_embeddings * (1 + 1e-12)) for table in tables
    }
    return [config.with_size(ratio=ratio) for ratio in ratios]


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(METHODS, TABLES, st.integers(1, 1000))
def test_the_largest_that_fits_is_found(method, tables, thousandths):
    if not valid(method, tables):
        return
    budget = max(1, sum(table.full_bytes for table in tables) * thousandths // 1000)
    floor = method.smallest(tables).footprint(tables).serve_bytes
    if budget < floor:
        with pytest.raises(BudgetError, match=f"smallest.* is {floor:,} bytes"):
            method.fit_budget(tables, budget)
        budget = floor  # which must then be reachable
    found = method.fit_budget(tables, budget)
    size = found.footprint(tables).serve_bytes
    assert size <= budget
    assert found.budget is None
    full = sum(table.full_bytes for table in tables)
    for other in larger(found, tables, size):
        other_size = other.footprint(tables).serve_bytes
        if size < other_size <= full:
            assert other_size > budget, f"{other} fits too: {size} < {other_size} <= {budget}"


@settings(max_examples=60, deadline=None)
@given(METHODS, TABLES)
def test_fitting_changes_nothing_but_the_size(method, tables):
    if not valid(method, tables):
        return
    found = method.fit_budget(tables, sum(table.full_bytes for table in tables) * 100)
    sizes = dict.fromkeys(("budget", *method.size_fields))
    if method.size_fields:
        again = dict.fromkeys(method.size_fields) | {method.size_fields[0]: 1, "budget": None}
        assert replace(found, **again) == replace(method, **again)
    else:
        assert replace(found, **sizes) == replace(method, **sizes)


@pytest.mark.parametrize("make", [Hash, QR, Unified])
def test_one_size_must_be_given_by_the_time_it_counts(make):
    field = make.size_fields[0]
    table = TableSpec(name="a", num_embeddings=500, embedding_dim=4, feature_names=("a",))
    for use in (make().footprint, Plan(default=make()).resolve):
        with pytest.raises(ConfigError, match=f"one of {', '.join(make.size_fields)}, budget"):
            use([table])
    assert Plan(default=make(), budget="30%").resolve([table]).footprint.serve_bytes <= 2400
    with pytest.raises(ConfigError, match=f"budget '30%' and the default method's {field}"):
        Plan(default=make(**{field: 9}), budget="30%")
    with pytest.raises(ConfigError, match=f"got {field} and budget"):
        make(**{field: 1, "budget": "10%"})


@pytest.mark.parametrize(
    ("make", "settings_", "named"),
    [
        (Hash, {"num_buckets": 0}, "num_buckets must be at least 1, got 0"),
        (Hash, {"ratio": 1.5}, "ratio must be in"),
        (Hash, {"ratio": 0.0}, "ratio must be in"),
        (Hash, {"ratio": float("nan")}, "ratio must be in"),
        (Hash, {"num_buckets": 1, "collisionless": -1}, "collisionless must be at least 0"),
        (QR, {"divisor": 0}, "divisor must be at least 1"),
        (QR, {"divisor": 2, "combine": "sum"}, "one of mult, add, concat, got 'sum'"),
        (Unified, {"num_buckets": 0}, "num_buckets must be at least 1"),
        (Unified, {"num_buckets": 1, "num_chunks": 0}, "num_chunks must be at least 1"),
        (Unified, {"num_buckets": 1, "num_tables": 0}, "num_tables must be at least 1"),
        (Unified, {"num_buckets": 1, "chunks": {"C1": 0}}, "chunks of 'C1' must be at least 1"),
        (Unified, {"num_buckets": 1, "init_range": 0.0}, "init_range must be positive"),
        (Unified, {"budget": "-3"}, "budget: expected"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, settings_, named):
    with pytest.raises(ConfigError, match=named):
        make(**settings_)


def test_the_error_below_the_floor_shows_the_way_out():
    tables = [
        TableSpec(name="a", num_embeddings=50, embedding_dim=4, feature_names=("a",)),
        TableSpec(name="b", num_embeddings=10**6, embedding_dim=4, feature_names=("b",)),
    ]
    with pytest.raises(BudgetError) as error:
        Hash(budget=100).fit_budget(tables, 100)
    text = str(error.value)
    assert "100 bytes" in text
    assert "1 small table(s) stay full and take 800 of these bytes" in text
    assert "Raise the budget" in text
    assert "a lower collisionless would hash them too" in text
