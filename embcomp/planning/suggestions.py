"""What to change when a plan does not fit: only changes that were tried and do fit are named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from embcomp.backends import BACKENDS
from embcomp.collection.plan import Plan
from embcomp.config.train_config import TrainConfig
from embcomp.errors import EmbcompError
from embcomp.planning.config_plan import ConfigPlan, TableSize, config_to_plan, table_specs
from embcomp.planning.placement import (
    PlacementError,
    PlacementRequest,
    place,
    smallest_memory,
    smallest_world,
)
from embcomp.planning.planner import beside_rows
from embcomp.tables.budget import format_bytes, parse_budget
from embcomp.tables.specs import TableSpec

WIDTHS_DOWN = (2, 4, 8)

Budget = str | int


def for_budget(config: TrainConfig, sizes: Sequence[TableSize]) -> list[str]:
    """Ways out of a `tables.budget` that the config's method cannot meet."""
    plan = config_to_plan(config)
    tables = table_specs(config, sizes)
    budget = plan.default.budget if plan.budget is None else plan.budget
    if budget is None:
        return []
    return [
        *_other_methods(plan, tables, budget),
        *_narrower(config, sizes, plan, budget),
        *_more_budget(plan, tables),
    ]


def for_devices(
    config: TrainConfig, sizes: Sequence[TableSize], plan: ConfigPlan, query: PlacementRequest
) -> list[str]:
    """Ways out when the planner finds no placement on the devices of `query`."""
    modules = plan.on_meta()
    found: list[str] = []
    try:
        place(modules, query)
    except PlacementError:
        pass
    else:
        return found
    # More than enough without a reserve, and as much again for one that is a share of it.
    most = 2 * (plan.replicated_bytes + plan_bytes(plan) + (1 << 30)) + query.reserved
    memory = smallest_memory(modules, query, most)
    if memory is not None:
        found.append(f"--device-memory {memory} ({format_bytes(memory)}): the least that is enough")
    world = smallest_world(modules, query)
    if world is not None:
        found.append(f"--world-size {world}: more devices of this size")
    found += _sharded_codes(plan, query)
    found += _lighter_optimizer(plan, query)
    found += _compressed(config, sizes, plan, query)
    return found


def plan_bytes(plan: ConfigPlan) -> int:
    """Bytes that training keeps for all tables, over all ranks."""
    return sum(line.train for line in (*plan.lines(), *plan.first_order_lines()))


def _other_methods(plan: Plan, tables: Sequence[TableSpec], budget: Budget) -> Iterator[str]:
    for name, method in BACKENDS.items():
        if name == plan.default.name or not method.size_fields:
            continue
        try:
            trial = replace(plan, default=method(budget=budget), budget=budget).resolve(tables)
        except EmbcompError:
            continue
        yield f"tables.method={name}: takes {format_bytes(trial.footprint.serve_bytes)}"


def _narrower(
    config: TrainConfig, sizes: Sequence[TableSize], plan: Plan, budget: Budget
) -> Iterator[str]:
    # A share of the full tables would shrink with the width: keep the bytes that were asked for.
    full = sum(table.full_bytes for table in table_specs(config, sizes))
    allowed = parse_budget(budget, full_bytes=full)
    for factor in WIDTHS_DOWN:
        width = config.tables.embedding_dim // factor
        if width < 1:
            return
        tables = table_specs(config, sizes, embedding_dim=width)
        try:
            size = replace(plan, budget=allowed).resolve(tables).footprint.serve_bytes
        except EmbcompError:
            continue
        yield f"tables.embedding_dim={width} tables.budget={allowed}: takes {format_bytes(size)}"
        return


def _more_budget(plan: Plan, tables: Sequence[TableSpec]) -> Iterator[str]:
    """The least budget that this plan's methods reach."""
    rest = [table for table in tables if table.name not in plan.overrides]
    try:
        smallest = plan.default.smallest(rest) if rest else plan.default
        least = replace(plan, default=smallest, budget=None).resolve(tables).footprint.serve_bytes
    except EmbcompError:
        return  # an override's own budget cannot be met
    yield f"tables.budget={least} ({format_bytes(least)}): the least that this method reaches"


def _sharded_codes(plan: ConfigPlan, query: PlacementRequest) -> Iterator[str]:
    sharded = replace(query, shard_codes_above=1)
    stages = plan.on_meta()
    if [beside_rows(s, sharded) for s in stages] == [beside_rows(s, query) for s in stages]:
        return
    try:
        place(stages, sharded)
    except PlacementError:
        return
    yield "train.shard_codes_above=1: codes, bitmaps and pointers of all tables are sharded"


def _lighter_optimizer(plan: ConfigPlan, query: PlacementRequest) -> Iterator[str]:
    for name in ("rowwise_adagrad", "sgd"):
        if name == query.optimizer or query.optimizer == "sgd":
            continue
        try:
            place(plan.on_meta(), replace(query, optimizer=name))
        except PlacementError:
            continue
        yield f"train.row_optimizer.name={name}: less optimizer state"
        return


def _compressed(
    config: TrainConfig, sizes: Sequence[TableSize], plan: ConfigPlan, query: PlacementRequest
) -> Iterator[str]:
    """A byte budget with which the tables can be placed, for the config's method or Unified."""
    method = config.tables.method.name if config.tables.method.settings.size_fields else "unified"
    free = query.world_size * (query.device_memory - query.reserved)
    for share in (0.9, 0.5, 0.25):
        budget = int(free * share * plan_serve_share(plan))
        try:
            trial = config_to_plan(config)
            smaller = replace(trial, default=BACKENDS[method](budget=budget), budget=budget)
            main = smaller.resolve(table_specs(config, sizes))
            place(replace(plan, main=main).on_meta(), query)
        except EmbcompError:
            continue
        yield f"tables.method={method} tables.budget={budget} ({format_bytes(budget)})"
        return


def plan_serve_share(plan: ConfigPlan) -> float:
    """Serving bytes over training bytes."""
    lines = (*plan.lines(), *plan.first_order_lines())
    return sum(line.serve for line in lines) / max(1, plan_bytes(plan))
