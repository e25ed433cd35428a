"""From trained full rows to the forms of a plan, without training: what every door goes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embcomp.backends import BACKENDS
from embcomp.backends.base import BackendConfig, MethodState, StageInputs
from embcomp.collection.group_states import GroupState
from embcomp.collection.plan import UNCOMPRESSED, Plan, ResolvedPlan
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import did_you_mean, listed
from embcomp.layers.block_work import IN_MEMORY, NamedWork, Work
from embcomp.layers.row_sources import RowSource
from embcomp.tables.specs import TableSpec


@dataclass(frozen=True, kw_only=True)
class Approximated:
    """Compressed tables.

    Args:
        plan: the methods in their serving forms.
        states: the same with their tensors, a form for each group of the plan.
    """

    plan: ResolvedPlan
    states: Sequence[GroupState]


def check_approximates(plan: Plan) -> None:
    """Refuse methods that cannot begin from trained rows, or lack what they need.

    Raises:
        ConfigError: names the method, and those that can.
    """
    for config in (plan.default, *plan.overrides.values()):
        if not config.approximates:
            able = listed(name for name, method in BACKENDS.items() if method.approximates)
            raise ConfigError(
                f"{config.name}: cannot begin from the rows of trained tables, which only its own "
                f"training finds; {able} can"
            )
        missing = config.missing()
        if missing is not None:
            raise ConfigError(missing)


def approximate(
    plan: ResolvedPlan,
    rows: Mapping[str, RowSource],
    *,
    counts: Mapping[str, Tensor],
    work: Work = IN_MEMORY,
    seed: int = 0,
) -> Approximated:
    """Compress full tables.

    Args:
        plan: the method of each table, sizes fixed.
        rows: by table, (num_embeddings, embedding_dim).
        counts: by table, (num_embeddings,) how often ids are looked up; the ids of tables that are
            missing count alike.
        work: does what is to be done for every block of rows.
        seed: of what is drawn beside what methods draw by their own seeds.
    """
    states: list[GroupState] = []
    for number, (config, tables) in enumerate(plan.groups):
        own = NamedWork(work, f"{number}-{config.name}")
        past = _inputs(tables, rows, counts, seed, own)
        states.append(GroupState(tables=tables, form=config.approximate(tables, past)))
    methods = {t.name: each.form.config for each in states for t in each.tables}
    found = ResolvedPlan(plan.tables, methods)
    _refuse_merged(plan, found)
    return Approximated(plan=found, states=states)


def sized_by_rows(
    wanted: Plan,
    plan: ResolvedPlan,
    allowed: int,
    rows: Mapping[str, RowSource],
    *,
    counts: Mapping[str, Tensor],
    work: Work = IN_MEMORY,
) -> ResolvedPlan:
    """The same plan, its default method at the size within the budget that these rows ask for.

    Args:
        wanted: the plan before its sizes were fixed.
        plan: the plan as theory sizes it.
        allowed: serving bytes of all tables.
        rows: by table, (num_embeddings, embedding_dim).
        counts: by table, (num_embeddings,) how often ids are looked up.
        work: does what is to be done for every candidate.
    """
    method = wanted.default
    tables = [table for table in plan.tables if table.name not in wanted.overrides]
    if method.size or not any(plan.methods[table.name] != UNCOMPRESSED for table in tables):
        return plan
    others = ResolvedPlan(
        tuple(table for table in plan.tables if table.name in wanted.overrides), plan.methods
    )
    left = allowed - (others.footprint.serve_bytes if others.tables else 0)
    past = _inputs(tables, rows, counts, 0, NamedWork(work, "size"))
    sized = replace(method, budget=None).fit_rows(tables, left, past)
    own = {t.name: UNCOMPRESSED if sized.keeps_full(t) else sized for t in tables}
    return ResolvedPlan(plan.tables, {**plan.methods, **own})


def _inputs(
    tables: Sequence[TableSpec],
    rows: Mapping[str, RowSource],
    counts: Mapping[str, Tensor],
    seed: int,
    work: Work,
) -> StageInputs:
    """What a method may look at: full tables, and counts; without any, all ids count alike."""
    alike = torch.ones(1, dtype=torch.float64)
    before = MethodState.of(UNCOMPRESSED, {f"rows.{t.name}": rows[t.name] for t in tables})
    return StageInputs(
        before=before,
        initial=lambda: before,
        counts={t.name: counts.get(t.name, alike.expand(t.num_embeddings)) for t in tables},
        seed=seed,
        work=work,
    )


def _refuse_merged(plan: ResolvedPlan, found: ResolvedPlan) -> None:
    """Two methods whose serving forms are one would share what was learnt apart."""
    before = [{table.name for table in tables} for _, tables in plan.groups]
    for _, tables in found.groups:
        names = {table.name for table in tables}
        if names not in before and found.methods[min(names)] != UNCOMPRESSED:
            raise ConfigError(
                f"tables {listed(sorted(names))} would have one serving form from two methods; give "
                "both tables one method, or their methods other seeds"
            )


def method_of(name: str) -> type[BackendConfig]:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in BACKENDS:
        able = listed(each for each, method in BACKENDS.items() if method.approximates)
        raise ConfigError(
            f"--method: unknown method {name!r}{did_you_mean(name, BACKENDS)}; from trained tables "
            f"there are {able}"
        )
    return BACKENDS[name]
