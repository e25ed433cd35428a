"""The size at which a method stays within a budget, rows counted in the type that they are served in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from embcomp.backends import BACKENDS
from embcomp.backends.base import BackendConfig
from embcomp.collection.plan import UNCOMPRESSED, Plan, ResolvedPlan
from embcomp.collection.table_row_types import RowTypes
from embcomp.errors import BudgetError
from embcomp.io.yaml_reading import listed
from embcomp.tables.row_types import served_footprint
from embcomp.tables.specs import TableSpec

_FINENESS = 2 ** (1 / 8)  # steps between the sizes that are tried
_MOST = 8  # int4 rows are an eighth of float32 ones


def served_bytes(plan: ResolvedPlan, types: RowTypes) -> int:
    """What a plan's tables take as they are served.

    Of a method whose serving form is found on the way, float32 rows are counted, which is a bound.
    """
    return sum(_served(config, tables, types) for config, tables in plan.groups)


def _served(config: BackendConfig, tables: Sequence[TableSpec], types: RowTypes) -> int:
    whole = config.footprint(tables)
    if not config.is_serving_form:
        return whole.serve_bytes
    return served_footprint(whole, types.of_group(config, tables)).serve_bytes


def plan_within(
    method: BackendConfig, tables: Sequence[TableSpec], allowed: int, types: RowTypes
) -> ResolvedPlan:
    """The largest size of a method within a budget.

    Args:
        method: its size is open.
        tables: all tables.
        allowed: bytes.
        types: how rows are served.

    Raises:
        BudgetError: the method has no size so small; the text names the floor.
    """
    open_sized = replace(method, budget=None)
    plan = Plan(default=open_sized, budget=None)
    least: int | None = None
    budget = float(allowed if types.are_fp32 else _MOST * allowed)
    while budget >= allowed:
        try:
            found = replace(plan, budget=int(budget)).resolve(tables)
        except BudgetError:
            break
        size = served_bytes(found, types)
        if size <= allowed:
            return found
        least = size if least is None else min(least, size)
        budget = (
            budget / _FINENESS if budget / _FINENESS > allowed or budget == allowed else allowed
        )
    if least is None:
        least = served_bytes(_smallest(open_sized, tables), types)
    full = sum(table.full_bytes for table in tables)
    raise BudgetError(
        f"{method.name}: {len(tables)} table(s) of {full:,} bytes cannot be held in {allowed:,} bytes; the "
        f"smallest {method.name} reaches is {least:,} bytes with rows in {types}.",
        way_out(),
    )


def _smallest(method: BackendConfig, tables: Sequence[TableSpec]) -> ResolvedPlan:
    least = method.smallest(tables)
    kept = {table.name for table in tables if least.keeps_full(table)}
    methods = {t.name: UNCOMPRESSED if t.name in kept else least for t in tables}
    return ResolvedPlan(tuple(tables), methods)


def way_out() -> str:
    """What to change when a budget is below the floor of what begins from trained rows."""
    able = listed(name for name, each in BACKENDS.items() if each.approximates and each.compresses)
    return f"Raise the budget, or take narrower rows (int8, int4) or another method ({able})."
