"""The size at which a method stays within a budget, rows counted in the type that they are served in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from embcomp.backends.base import BackendConfig
from embcomp.collection.plan import Plan, ResolvedPlan
from embcomp.collection.table_row_types import RowTypes
from embcomp.errors import BudgetError
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
    plan = Plan(default=replace(method, budget=None), budget=None)
    least: int | None = None
    budget = float(allowed if types.are_fp32 else _MOST * allowed)
    refusal: BudgetError | None = None
    while budget >= allowed:
        try:
            found = replace(plan, budget=int(budget)).resolve(tables)
        except BudgetError as error:
            refusal = error
            break
        size = served_bytes(found, types)
        if size <= allowed:
            return found
        least = size if least is None else min(least, size)
        budget = (
            budget / _FINENESS if budget / _FINENESS > allowed or budget == allowed else allowed
        )
    if least is None:
        assert refusal is not None
        raise refusal
    raise BudgetError(
        f"{method.name}: {len(tables)} table(s) take {least:,} bytes with rows in {types}, over the "
        f"{allowed:,} bytes of the budget. Raise the budget, or choose narrower rows or another method"
    )
