"""Which method holds which table, and how many bytes that makes. Nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from embcomp.backends.base import BackendConfig
from embcomp.backends.full import Full
from embcomp.errors import BudgetError, ConfigError
from embcomp.tables.budget import parse_budget
from embcomp.tables.footprint import Footprint
from embcomp.tables.specs import TableSpec, by_name, refuse_twice

UNCOMPRESSED = Full()
"""The method of tables that none compresses."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Methods for tables, and the bytes that they may take together.

    Args:
        default: method of every table that is not in `overrides`.
        overrides: method of single tables, by name. Tables with equal configs form one group:
            they share its physical tables and its budget.
        budget: serving bytes of all tables together, as `"64MiB"`, bytes, or `"10%"` of the
            full tables. The default method gets what the overrides leave, whatever budget it
            names itself; its size must be open.
    """

    default: BackendConfig = field(default_factory=Full)
    overrides: Mapping[str, BackendConfig] = field(default_factory=dict)
    budget: str | int | None = None

    def __post_init__(self) -> None:
        if self.budget is None:
            return
        parse_budget(self.budget)
        if self.default.size:
            raise ConfigError(
                f"plan: budget {self.budget!r} and the default method's "
                f"{' and '.join(self.default.size)} would both fix its size; give one of them"
            )

    @classmethod
    def of(cls, plan: Plan | BackendConfig | Mapping[str, BackendConfig] | None) -> Plan:
        """Read the short forms: one method for all tables, or a method for some by name."""
        if plan is None:
            return cls()
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, BackendConfig):
            return cls(default=plan)
        return cls(overrides=dict(plan))

    def resolve(self, tables: Sequence[TableSpec]) -> ResolvedPlan:
        """Turn budgets into sizes and leave full what compression would not shrink.

        Raises:
            ConfigError: for an override of a table that does not exist, or no tables at all.
            BudgetError: for a budget that cannot be met; the text names the floor.
        """
        if not tables:
            raise ConfigError("a collection needs at least one table, got none")
        tables = [table.without_repeats() for table in tables]
        refuse_twice(table.name for table in tables)
        check_known("plan", self.overrides, tables)
        for config in (self.default, *self.overrides.values()):
            check_known(config.name, config.named_tables(), tables)
        by_config: list[tuple[BackendConfig, list[TableSpec]]] = []
        for table in tables:
            if table.name in self.overrides:
                _add(by_config, self.overrides[table.name], table)
        rest = [table for table in tables if table.name not in self.overrides]
        sized = [(_sized(config, group), group) for config, group in by_config]
        if rest:
            spent = sum(config.footprint(group).serve_bytes for config, group in sized)
            sized.append((self._default_for(rest, tables, spent), rest))
        methods = {
            table.name: Full() if config.keeps_full(table) else config
            for config, group in sized
            for table in group
        }
        resolved = ResolvedPlan(tuple(tables), methods)
        _check_init_fns(resolved)
        self._check_budget(resolved)
        return resolved

    def _default_for(
        self, rest: list[TableSpec], tables: Sequence[TableSpec], spent: int
    ) -> BackendConfig:
        """The default method, sized by the whole budget less what the overrides have spent."""
        if self.budget is None:
            return _sized(self.default, rest)
        budget = parse_budget(self.budget, full_bytes=sum(t.full_bytes for t in tables))
        if budget <= spent:
            raise BudgetError(
                f"plan: the overrides take {spent:,} bytes, which leaves nothing of the budget of "
                f"{budget:,} bytes for {len(rest)} other table(s). Raise the budget or compress "
                "the overrides."
            )
        return _within(self.default, rest, budget - spent)

    def _check_budget(self, resolved: ResolvedPlan) -> None:
        if self.budget is None:
            return
        budget = parse_budget(self.budget, full_bytes=resolved.full_bytes)
        size = resolved.footprint.serve_bytes
        if size > budget:
            raise BudgetError(
                f"plan: the tables take {size:,} bytes, over the budget of {budget:,} bytes. "
                "Raise the budget or compress more tables."
            )


def _check_init_fns(plan: ResolvedPlan) -> None:
    """Raise a ConfigError where a user's own initialisation would be given to no row."""
    for config, group in plan.groups:
        own = [table for table in group if table.init_fn is not None]
        used = config.first_method().physical_tables(group) if own else []
        for table in own:
            if all(physical.init_fn is not table.init_fn for physical in used):
                raise ConfigError(
                    f"table {table.name!r}: {config.name} draws rows of its own shape, which an init_fn "
                    "was not made for; leave init_fn out, or hold the table full"
                )


def check_known(source: str, named: Iterable[str], tables: Sequence[TableSpec]) -> None:
    """Raise a ConfigError where tables are named that are not there.

    Args:
        source: what names them, for the message.
        named: their names.
        tables: all tables.
    """
    unknown = set(named)
    if unknown:  # for nearly all methods there are none, and a search asks often
        unknown -= {table.name for table in tables}
    if unknown:
        raise ConfigError(
            f"{source}: no table is called {', '.join(map(repr, sorted(unknown)))}; "
            f"the tables are {', '.join(table.name for table in tables)}"
        )


def _add(
    groups: list[tuple[BackendConfig, list[TableSpec]]], config: BackendConfig, table: TableSpec
) -> None:
    for known, group in groups:
        if known == config:
            group.append(table)
            return
    groups.append((config, [table]))


def _sized(config: BackendConfig, group: Sequence[TableSpec]) -> BackendConfig:
    if config.budget is not None:
        return _within(config, group, config.budget)
    config.require_size()
    return config


def _within(config: BackendConfig, group: Sequence[TableSpec], budget: str | int) -> BackendConfig:
    """The method at the largest size within the budget; no method where the full tables fit."""
    full = sum(table.full_bytes for table in group)
    if full <= parse_budget(budget, full_bytes=full):
        return Full()
    return config.fit_budget(group, budget)


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan with every size fixed.

    Args:
        tables: the logical tables, in the order declared. Here a table has a feature once, however often
            it was declared.
        methods: the method of each, by name; none has a budget any more.
    """

    tables: tuple[TableSpec, ...]
    methods: Mapping[str, BackendConfig]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tables", tuple(table.without_repeats() for table in self.tables))

    @property
    def groups(self) -> list[tuple[BackendConfig, list[TableSpec]]]:
        """Tables that share a method and its physical tables, all in the order of their names.

        So what methods make of a group does not depend on the order in which tables are declared.
        """
        groups: list[tuple[BackendConfig, list[TableSpec]]] = []
        for table in by_name(self.tables):
            _add(groups, self.methods[table.name], table)
        return groups

    @property
    def full_bytes(self) -> int:
        """Serving bytes of the uncompressed tables."""
        return sum(table.full_bytes for table in self.tables)

    @property
    def footprint(self) -> Footprint:
        """Bytes of all tables as planned."""
        return sum((config.footprint(group) for config, group in self.groups), Footprint())

    @property
    def compression_ratio(self) -> float:
        """Full bytes over planned serving bytes; 1 without tables."""
        if not self.tables:
            return 1.0
        return self.full_bytes / self.footprint.serve_bytes
