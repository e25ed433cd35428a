"""From the collections of a model to compressed forms of their tables, within one budget for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from embcomp.collection.plan import Plan, ResolvedPlan, check_known
from embcomp.collection.single_table import embeddings_of
from embcomp.collection.sourced import SourcedTables
from embcomp.compressing.approximation import Approximated, approximate, sized_by_rows
from embcomp.compressing.approximation_error import CompressedTable, bytes_by_table, measure
from embcomp.compressing.found_tensors import first_odd_row
from embcomp.compressing.model_tables import ModelTables
from embcomp.compressing.sizing import way_out
from embcomp.errors import BudgetError, DataError
from embcomp.layers.block_work import RowBlock, Work, row_blocks
from embcomp.layers.id_counts import check_counts
from embcomp.layers.row_sources import RowSource
from embcomp.tables.budget import parse_budget
from embcomp.tables.specs import TableSpec


@dataclass(frozen=True, kw_only=True)
class TableForms:
    """A collection's tables, compressed.

    Attributes:
        tables: what they were.
        found: what they are.
        lines: what that costs, a line for each table.
    """

    tables: ModelTables
    found: Approximated
    lines: Sequence[CompressedTable]


@torch.no_grad()
def forms_of(
    found: Sequence[ModelTables],
    wanted: Plan,
    *,
    counts: Mapping[str, Tensor],
    seed: int,
    work: Work,
) -> list[TableForms]:
    """Compress the tables of collections; the same numbers whoever does the work.

    Args:
        found: the collections.
        wanted: the plan of all of them.
        counts: by table, (num_embeddings,) how often each id is looked up.
        seed: of what is drawn.
        work: does what is to be done for every block of rows.

    Raises:
        ConfigError: a plan or counts of tables that are not there.
        BudgetError: a budget below the floor.
        DataError: rows with NaN.
    """
    specs = [spec for each in found for spec in each.specs]
    check_known("plan", wanted.overrides, specs)
    known = check_counts(specs, counts)
    for each in found:
        _check_finite(each, work)
    plans = [_own_plan(wanted, each, found) for each in found]
    resolved = [_resolved(own, each.specs) for own, each in zip(plans, found)]
    return [
        _compressed(each, own, sizes, known, seed, work)
        for each, own, sizes in zip(found, plans, resolved)
    ]


def _resolved(plan: Plan, tables: Sequence[TableSpec]) -> ResolvedPlan:
    try:
        return plan.resolve(tables)
    except BudgetError as error:
        raise BudgetError(error.fact, way_out()) from None


def _own_plan(wanted: Plan, own: ModelTables, found: Sequence[ModelTables]) -> Plan:
    """The plan of one collection: its tables' overrides, and its share of all budgets in bytes."""
    names = {spec.name for spec in own.specs}
    overrides = {name: method for name, method in wanted.overrides.items() if name in names}
    if len(found) == 1:
        return replace(wanted, overrides=overrides)
    full = sum(spec.full_bytes for each in found for spec in each.specs)
    part = sum(spec.full_bytes for spec in own.specs)

    def share(budget: str | int | None) -> int | None:
        if budget is None:
            return None
        return max(1, parse_budget(budget, full_bytes=full) * part // full)

    default = replace(wanted.default, budget=share(wanted.default.budget))
    return Plan(default=default, overrides=overrides, budget=share(wanted.budget))


def _check_finite(tables: ModelTables, work: Work) -> None:
    for name, rows in tables.rows.items():

        def first_odd(block: RowBlock, rows: RowSource = rows) -> dict[str, Tensor]:
            odd = first_odd_row(rows.read(block.start, block.stop))
            return {"rows": torch.tensor([] if odd is None else [block.start + odd])}

        blocks = row_blocks(name, len(rows), rows.shape[1])
        odd = [each["rows"] for each in work.map(f"finite-{name}", first_odd, blocks)]
        if any(map(len, odd)):
            raise DataError(
                f"table {name!r}{f' of {tables.path}' if tables.path else ''}: row "
                f"{int(torch.cat(odd)[0]):,} holds NaN or an infinity; nothing was changed. Load "
                "weights from before training diverged"
            )


def _compressed(
    tables: ModelTables,
    wanted: Plan,
    plan: ResolvedPlan,
    counts: Mapping[str, Tensor],
    seed: int,
    work: Work,
) -> TableForms:
    rows = tables.rows
    own = {spec.name: counts[spec.name] for spec in tables.specs if spec.name in counts}
    allowed = _allowed(wanted, plan)
    if allowed is not None:
        plan = sized_by_rows(wanted, plan, allowed, rows, counts=own, work=work)
    found = approximate(plan, rows, counts=own, seed=seed, work=work)
    stored = SourcedTables.of_states(_configs(tables), found.plan, found.states)
    sizes = bytes_by_table(
        [(group, config.footprint(group).serve_bytes) for config, group in found.plan.groups]
    )
    lines = []
    for spec in tables.specs:
        error = measure(
            spec,
            rows[spec.name],
            lambda table, ids: embeddings_of(stored, table, ids),
            counts=own.get(spec.name),
            work=work,
        )
        line = CompressedTable(
            table=spec.name,
            place=tables.path,
            method=found.plan.methods[spec.name].name,
            rows=spec.num_embeddings,
            columns=spec.embedding_dim,
            full_bytes=spec.full_bytes,
            bytes=sizes[spec.name],
            error=error,
        )
        lines.append(line)
    return TableForms(tables=tables, found=found, lines=lines)


def _configs(tables: ModelTables) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=spec.name,
            num_embeddings=spec.num_embeddings,
            embedding_dim=spec.embedding_dim,
            feature_names=list(spec.feature_names),
        )
        for spec in tables.specs
    ]


def _allowed(wanted: Plan, plan: ResolvedPlan) -> int | None:
    """Bytes that a plan's tables may take together; None where its sizes are given."""
    if wanted.budget is not None:
        return parse_budget(wanted.budget, full_bytes=plan.full_bytes)
    if wanted.default.budget is None:
        return None
    others = [table for table in plan.tables if table.name in wanted.overrides]
    rest = sum(table.full_bytes for table in plan.tables if table.name not in wanted.overrides)
    spent = ResolvedPlan(tuple(others), plan.methods).footprint.serve_bytes if others else 0
    return spent + parse_budget(wanted.default.budget, full_bytes=rest)
