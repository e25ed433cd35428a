"""A trained model made smaller where it is: each embedding collection becomes a compressed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from embcomp.backends.base import BackendConfig
from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.collection.plan import Plan, ResolvedPlan, check_known
from embcomp.collection.single_table import embeddings_of
from embcomp.compressing.approximation import (
    approximate,
    check_approximates,
    check_counts,
    sized_by_rows,
)
from embcomp.compressing.approximation_error import (
    CompressedTable,
    bytes_by_table,
    measure,
    table_lines,
)
from embcomp.compressing.model_tables import Include, ModelTables, find_tables
from embcomp.errors import DataError
from embcomp.layers.block_work import IN_MEMORY
from embcomp.layers.row_sources import MemoryRows
from embcomp.tables.budget import parse_budget

AnyMethods = Plan | BackendConfig | Mapping[str, BackendConfig]


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """What `compress_` did; as text, one line for each table.

    Attributes:
        model: the model; another module than was given only where that was a collection itself.
        tables: the compressed tables.
        notes: what else there is to know.
    """

    model: nn.Module
    tables: Sequence[CompressedTable]
    notes: Sequence[str] = field(default=())

    @property
    def full_bytes(self) -> int:
        """What the tables took."""
        return sum(table.full_bytes for table in self.tables)

    @property
    def bytes(self) -> int:
        """What they are served in now."""
        return sum(table.bytes for table in self.tables)

    def __str__(self) -> str:
        lines = table_lines(self.tables)
        widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines]
        total = f"{self.bytes:,} of {self.full_bytes:,} bytes ({self.bytes / self.full_bytes:.1%})"
        return "\n".join([*text, total, *self.notes])


@torch.no_grad()
def compress_(
    model: nn.Module,
    plan: AnyMethods,
    *,
    counts: Mapping[str, Tensor] | None = None,
    include: Include = None,
    seed: int = 0,
) -> CompressionReport:
    """Replace a model's embedding collections by compressed ones with the best approximation of their rows.

    EmbeddingBagCollection, EmbeddingCollection, `nn.Embedding` and `nn.EmbeddingBag` are replaced, and
    our own collections of full tables, wherever they are in the model; nothing is changed unless all
    of them can be. The model answers at once, trains on, shards and exports as any other;
    DistributedModelParallel draws rows anew, so that its state dict is loaded into the sharded model.

    Args:
        model: a trained model that is not sharded.
        plan: a method for all tables, methods by table name, or a Plan; other tables stay full. A
            budget in bytes is shared by all collections in proportion to what they take.
        counts: by table, (num_embeddings,) how often each id is looked up. The ids of tables
            that are missing count alike.
        include: which collections: a regular expression found in their paths, or a function of path
            and module.
        seed: of what is drawn.

    Raises:
        ConfigError: a method that cannot begin from trained rows, a sharded model, nothing to compress.
        BudgetError: a budget below the floor.
        DataError: counts of another length, or rows with NaN.
    """
    wanted = Plan.of(plan)
    check_approximates(wanted)
    found = find_tables(model, include)
    specs = [spec for each in found for spec in each.specs]
    check_known("plan", wanted.overrides, specs)
    known = check_counts(counts or {}, specs)
    for each in found:
        _check_finite(each)
    plans = [_own_plan(wanted, each, found) for each in found]
    resolved = [own.resolve(each.specs) for own, each in zip(plans, found)]
    made = [
        _compressed(each, own, sizes, known, seed)
        for each, own, sizes in zip(found, plans, resolved)
    ]
    notes = _tied(model, found)
    for each, (module, _) in zip(found, made):
        module.train(each.module.training)
        model = _put(model, each.path, module)
    return CompressionReport(
        model=model, tables=[line for _, lines in made for line in lines], notes=notes
    )


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


def _check_finite(tables: ModelTables) -> None:
    for name, weight in tables.weights.items():
        if not bool(torch.isfinite(weight).all()):
            row = int((~torch.isfinite(weight).all(1)).nonzero()[0, 0])
            raise DataError(
                f"table {name!r}{f' of {tables.path}' if tables.path else ''}: row {row:,} holds NaN "
                "or an infinity; nothing was changed. Load weights from before training diverged"
            )


def _compressed(
    tables: ModelTables,
    wanted: Plan,
    plan: ResolvedPlan,
    counts: Mapping[str, Tensor],
    seed: int,
) -> tuple[nn.Module, list[CompressedTable]]:
    """What takes a collection's place, and what that costs."""
    rows = {name: MemoryRows(weight.cpu()) for name, weight in tables.weights.items()}
    own = {spec.name: counts[spec.name] for spec in tables.specs if spec.name in counts}
    allowed = _allowed(wanted, plan)
    if allowed is not None:
        plan = sized_by_rows(wanted, plan, allowed, rows, counts=own)
    found = approximate(plan, rows, counts=own, seed=seed)
    module, collection = tables.build(found.plan)
    assert isinstance(collection, (CompressedEmbeddingBagCollection, CompressedEmbeddingCollection))
    collection.load_states([replace(each, form=each.form.in_memory()) for each in found.states])
    collection.eval()
    sizes = bytes_by_table(
        [(group, config.footprint(group).serve_bytes) for config, group in found.plan.groups]
    )
    lines = []
    for spec in tables.specs:
        error = measure(
            spec,
            rows[spec.name],
            lambda table, ids: embeddings_of(collection, table, ids),
            counts=own.get(spec.name),
            work=IN_MEMORY,
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
    return module, lines


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


def _put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The model with a module at a path, and wherever else the one that was there stands."""
    if not path:
        return module
    old = model.get_submodule(path)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, module)
    return model


def _tied(model: nn.Module, found: Sequence[ModelTables]) -> list[str]:
    """Lines on parameters of what is replaced that other modules have as well, and keep."""
    replaced = {id(parameter) for each in found for parameter in each.module.parameters()}
    inside = {id(module) for each in found for module in each.module.modules()}
    return [
        f"{path}.{name} is the same tensor as a table's and stays as it is: its bytes are not saved"
        for path, module in model.named_modules()
        if id(module) not in inside
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in replaced
    ]
