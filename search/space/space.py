"""What a search may choose: units of tables, each with its options, made from groups of tables.

A unit is a table, or several whose choice is tied; `embcomp.search.space.options` makes their options.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from embcomp.backends.base import BackendConfig
from embcomp.collection.plan import Plan, ResolvedPlan, check_known
from embcomp.collection.table_row_types import RowTypes
from embcomp.config.train_config import TrainConfig
from embcomp.errors import ConfigError
from embcomp.planning.config_plan import ConfigPlan, TableSize, plan_config, table_specs
from embcomp.search.config.choices import ROW_TYPE, GroupConfig, RowBand
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.space.options import Unit, fixed_unit, unit_of
from embcomp.tables.row_types import ROW_TYPES, RowType
from embcomp.tables.specs import TableSpec

Candidate = tuple[int, ...]
"""The position of the chosen option, for each unit of a space."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """All units of a search.

    Args:
        units: fixed ones included, in the order of their first table.
        base: the training recipe.
        sizes: the features.
        recipe_plan: the recipe's tables as it stores them; first-order weights are taken from it.
        notes: what was dropped, for people.
    """

    units: tuple[Unit, ...]
    base: TrainConfig
    sizes: tuple[TableSize, ...]
    recipe_plan: ConfigPlan
    notes: tuple[str, ...] = field(default=(), repr=False)

    @property
    def tables(self) -> list[TableSpec]:
        """All tables, in the dataset's order."""
        found = [table for unit in self.units for table in unit.tables]
        return sorted(found, key=lambda table: table.index)

    @property
    def full_bytes(self) -> int:
        """Serving bytes of the uncompressed tables."""
        return sum(unit.full_bytes for unit in self.units)

    @property
    def size(self) -> int:
        """Number of candidates, those over the budget included."""
        return math.prod(len(unit.options) for unit in self.units)

    def methods(self, candidate: Candidate) -> dict[str, BackendConfig]:
        """The method of each table."""
        chosen = {}
        for unit, place in zip(self.units, candidate):
            for table in unit.tables:
                chosen[table.name] = unit.options[place].config
        return {table.name: chosen[table.name] for table in self.tables}

    def row_types(self, candidate: Candidate) -> RowTypes:
        """The row type of each table."""
        chosen = {
            table.name: unit.options[place].row_type
            for unit, place in zip(self.units, candidate)
            for table in unit.tables
        }
        names = [table.name for table in self.tables]
        each = [chosen[name] for name in names]
        default = min(ROW_TYPES, key=lambda one: (-each.count(one), ROW_TYPES.index(one)))
        own = {name: chosen[name] for name in names if chosen[name] != default}
        return RowTypes(default=default, tables=own)

    def labels(self, candidate: Candidate) -> dict[str, str]:
        """The chosen option of each unit, for people."""
        return {unit.name: unit.options[place].label for unit, place in zip(self.units, candidate)}

    def plan(self, candidate: Candidate) -> ResolvedPlan:
        """The candidate as the plan of a collection."""
        return Plan(overrides=self.methods(candidate)).resolve(self.tables)

    def config_plan(self, candidate: Candidate) -> ConfigPlan:
        """The candidate's tables with first-order weights and optimizer, as the planner needs."""
        return ConfigPlan(
            main=self.plan(candidate),
            first_order=self.recipe_plan.first_order,
            optimizer=self.recipe_plan.optimizer,
            dense_rows=self.recipe_plan.dense_rows,
            sizes=self.sizes,
            row_types=self.row_types(candidate),
        )

    def candidate_of(self, labels: Mapping[str, str]) -> Candidate:
        """The candidate that `labels` describes."""
        return tuple(
            next(i for i, option in enumerate(unit.options) if option.label == labels[unit.name])
            for unit in self.units
        )


def build_space(config: SearchConfig, base: TrainConfig, sizes: Sequence[TableSize]) -> Space:
    """The space of a search over a dataset's features.

    Raises:
        ConfigError: when nothing is left to choose, or a table is named that does not exist.
    """
    if not base.model.settings.uses_embeddings:
        raise ConfigError(f"model {base.model.name!r} has no embedding tables to search over")
    specs = {spec.name: spec for spec in table_specs(base, sizes)}
    _refuse_unknown(config, specs)
    units: list[Unit] = []
    dropped: list[tuple[str, str]] = []
    left = dict(specs)
    for name, choice in config.fixed.items():
        ((method, row_type),) = choice.configs(base.tables.embedding_dim).values()
        units.append(fixed_unit(left.pop(name), method, row_type))
    for group in sorted(config.groups, key=lambda group: group.tables == "all"):
        tables = list(_members(group, left))
        if not tables:
            raise ConfigError(f"groups: no table is left for {_described(group)}")
        for table in tables:
            del left[table.name]
        for members in [tables] if group.tied else [[table] for table in tables]:
            units.append(unit_of(group, members, tables, base, dropped))
    of_recipe = RowTypes.of(base.tables.row_types)
    units += [
        fixed_unit(table, _of_recipe(base, table), of_recipe.of_table(table.name))
        for table in left.values()
    ]
    known = list(specs.values())
    for unit in units:
        for option in unit.options:
            check_known(option.config.name, option.config.named_tables(), known)
    units.sort(key=lambda unit: unit.tables[0].index)
    notes = _notes(dropped)
    space = Space(
        units=tuple(units),
        base=base,
        sizes=tuple(sizes),
        recipe_plan=_first_order_plan(base, sizes),
        notes=notes,
    )
    if space.size == 1 and config.sampler.name != "gradient":
        raise ConfigError(
            "groups: the space holds one candidate only, so there is nothing to search"
            + "".join(f"\n  {note}" for note in notes[:10])
        )
    _refuse_unknown_units(config, space)
    _refuse_types_apart(space)
    return space


def _notes(dropped: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """One line for each dropped choice, with the tables that lose it."""
    names: dict[str, list[str]] = {}
    for name, label in dropped:
        names.setdefault(label, []).append(name)
    notes = []
    for label, tables in names.items():
        shown = ", ".join(tables[:5]) + (f" and {len(tables) - 5} more" if tables[5:] else "")
        notes.append(f"{label}: not smaller than the full table for {shown}")
    return tuple(notes)


def _of_recipe(base: TrainConfig, table: TableSpec) -> BackendConfig:
    """The recipe's own method for a table that no group names."""
    chosen = base.tables.overrides.get(table.name, base.tables.method).settings
    if chosen.budget is not None or (chosen.size_fields and not chosen.size):
        raise ConfigError(
            f"table {table.name!r} is in no group, and the recipe sizes its {chosen.name} by a "
            "budget, which a search has another use for; name the table in a group or under fixed"
        )
    return chosen


def _first_order_plan(base: TrainConfig, sizes: Sequence[TableSize]) -> ConfigPlan:
    """First-order weights, the optimizer and the mode; the main tables are the candidate's."""
    document = base.model_dump(mode="json")
    document["tables"] |= {"method": "full", "budget": None, "overrides": {}}
    return plan_config(TrainConfig.model_validate(document), sizes)


def _members(group: GroupConfig, left: Mapping[str, TableSpec]) -> Iterator[TableSpec]:
    for name, table in left.items():
        if group.tables == "all":
            yield table
        elif isinstance(group.tables, RowBand):
            most = group.tables.max_rows
            rows = table.num_embeddings
            if rows >= group.tables.min_rows and (most is None or rows <= most):
                yield table
        elif name in group.tables:
            yield table


def _described(group: GroupConfig) -> str:
    if isinstance(group.tables, RowBand):
        return f"rows in [{group.tables.min_rows:,}, {group.tables.max_rows or 'any'}]"
    return group.tables if isinstance(group.tables, str) else ", ".join(group.tables)


def _refuse_unknown(config: SearchConfig, specs: Mapping[str, TableSpec]) -> None:
    named = [
        name for group in config.groups if isinstance(group.tables, tuple) for name in group.tables
    ]
    unknown = sorted({*named, *config.fixed} - set(specs))
    if unknown:
        raise ConfigError(
            f"no table is called {', '.join(map(repr, unknown))}; the tables are {', '.join(specs)}"
        )
    twice = sorted(
        {name for name in named if named.count(name) > 1} | set(named) & set(config.fixed)
    )
    if twice:
        raise ConfigError(f"tables named twice under groups and fixed: {', '.join(twice)}")


def _refuse_unknown_units(config: SearchConfig, space: Space) -> None:
    names = [unit.name for unit in space.units]
    unknown = sorted(set(config.importance) - set(names))
    if unknown:
        raise ConfigError(
            f"importance: nothing to choose for is called {', '.join(map(repr, unknown))}; "
            f"there are {', '.join(names)}"
        )


def _refuse_types_apart(space: Space) -> None:
    """Tables of one method that share stored rows must not be able to differ in their type."""
    users: list[tuple[BackendConfig, dict[str, Unit], set[RowType]]] = []
    for unit in space.units:
        for option in unit.options:
            same = [user for user in users if user[0] == option.config]
            user = same[0] if same else (option.config, {}, set())
            if not same:
                users.append(user)
            user[1][unit.name] = unit
            user[2].add(option.row_type)
    for config, units, types in users:
        tables = [table for unit in units.values() for table in unit.tables]
        if len(units) > 1 and len(types) > 1 and config.stores_together(tables):
            raise ConfigError(
                f"{ROW_TYPE}: {config.name} stores rows of {', '.join(list(units)[:5])} together, "
                f"and they could differ in their type ({', '.join(sorted(types))}). Give it one "
                f"{ROW_TYPE}, or tie the group (tied: true)"
            )
