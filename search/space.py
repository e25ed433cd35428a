"""What a search may choose: units of tables, and the ways in which each can be stored.

A unit is a table, or several whose choice is tied. Its options are sorted by bytes. An option that
would not be smaller than the full table is dropped; the full table stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from embcomp.backend import BackendConfig
from embcomp.backends import Full
from embcomp.config import TrainConfig
from embcomp.errors import ConfigError
from embcomp.plan import Plan, ResolvedPlan
from embcomp.planning import ConfigPlan, TableSize, plan_config, table_specs
from embcomp.row_types import ROW_TYPES, RowType
from embcomp.search.choices import ROW_TYPE, GroupConfig, RowBand
from embcomp.search.config import SearchConfig
from embcomp.table_row_types import RowTypes, is_final
from embcomp.tables import TableSpec

Candidate = tuple[int, ...]
"""The position of the chosen option, for each unit of a space."""


@dataclass(frozen=True)
class Option:
    """One way to store a unit.

    Args:
        config: the method.
        label: for people, as ``hash ratio=0.1``.
        bytes: serving bytes of the unit's tables; their part, where others share the storage.
        line: what does not change when only the size does; shrinking keeps to a line if it can.
        row_type: what its rows are served in; the most exact type of those that are no longer.
    """

    config: BackendConfig
    label: str
    bytes: int
    line: tuple[object, ...]
    row_type: RowType = "fp32"

    @property
    def is_full(self) -> bool:
        """Whether it is the uncompressed table."""
        return isinstance(self.config, Full) and self.row_type == "fp32"


@dataclass(frozen=True)
class Variant:
    """One entry of a group's choices: a grid whose places lead to options.

    Args:
        label: the method's name, with a number if it is there twice.
        grid: the searched settings and their values.
        option_at: position of an option for each place in the grid.
    """

    label: str
    grid: Mapping[str, tuple[Any, ...]]
    option_at: Mapping[tuple[int, ...], int]


@dataclass(frozen=True)
class Unit:
    """Tables that take one choice together.

    Args:
        name: the table's name, or the group's.
        tables: its tables.
        options: by bytes, then label; never empty.
        variants: how options come from settings; empty for a fixed unit.
    """

    name: str
    tables: tuple[TableSpec, ...]
    options: tuple[Option, ...]
    variants: tuple[Variant, ...] = ()

    @property
    def rows(self) -> int:
        """Logical rows."""
        return sum(table.num_embeddings for table in self.tables)

    @property
    def full_bytes(self) -> int:
        """Serving bytes uncompressed."""
        return sum(table.full_bytes for table in self.tables)

    @cached_property
    def line_of(self) -> tuple[tuple[int, ...], ...]:
        """For each option, the options of its line, by bytes; the full table ends every line."""
        full = [i for i, option in enumerate(self.options) if option.is_full]
        lines = []
        for option in self.options:
            same = [i for i, other in enumerate(self.options) if other.line == option.line]
            lines.append(tuple(sorted({*same, *full})))
        return tuple(lines)


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
        units.append(_fixed_unit(left.pop(name), method, row_type))
    for group in sorted(config.groups, key=lambda group: group.tables == "all"):
        tables = list(_members(group, left))
        if not tables:
            raise ConfigError(f"groups: no table is left for {_described(group)}")
        for table in tables:
            del left[table.name]
        for members in [tables] if group.tied else [[table] for table in tables]:
            units.append(_unit(group, members, tables, base, dropped))
    of_recipe = RowTypes.of(base.tables.row_types)
    units += [
        _fixed_unit(table, _of_recipe(base, table), of_recipe.of_table(table.name))
        for table in left.values()
    ]
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


def stored_together(config: BackendConfig, tables: Sequence[TableSpec]) -> bool:
    """Whether a method's bytes for several tables are not the sum of its bytes for each."""
    if len(tables) < 2:
        return False
    apart = [tensor for table in tables for tensor in config.footprint([table]).tensors]
    together = config.footprint(tables).tensors
    key = sorted((t.name, t.rows, t.columns, t.itemsize) for t in apart)
    return key != sorted((t.name, t.rows, t.columns, t.itemsize) for t in together) or len(
        {t.name for t in apart}
    ) < len(apart)


def _unit(
    group: GroupConfig,
    members: list[TableSpec],
    neighbours: list[TableSpec],
    base: TrainConfig,
    notes: list[tuple[str, str]],
) -> Unit:
    name = members[0].name if len(members) == 1 else f"{members[0].name} to {members[-1].name}"
    full = sum(table.full_bytes for table in members)
    options: dict[str, Option] = {}
    places: list[tuple[str, Mapping[str, tuple[Any, ...]], dict[tuple[int, ...], str]]] = []
    dropped = []
    methods = [choice.method for choice in group.choices]
    for number, choice in enumerate(group.choices):
        twice = methods.count(choice.method) > 1
        variant = f"{choice.method} {number + 1}" if twice else choice.method
        labels = {}
        grid = choice.grid(base.tables.embedding_dim)
        for place, (config, row_type) in choice.configs(base.tables.embedding_dim).items():
            option = _option(config, row_type, grid, place, variant, members, neighbours)
            if option.bytes >= full and not option.is_full:
                dropped.append(option.label)
                option = _full_option(full)
            same = [o for o in options.values() if (o.line, o.bytes) == (option.line, option.bytes)]
            option = same[0] if same else option
            labels[place] = option.label
            options.setdefault(option.label, option)
        places.append((variant, grid, labels))
    notes += [(name, label) for label in dropped]
    ranked = sorted(options.values(), key=lambda option: (option.bytes, option.label))
    position = {option.label: i for i, option in enumerate(ranked)}
    variants = tuple(
        Variant(label, grid, {place: position[option] for place, option in labels.items()})
        for label, grid, labels in places
    )
    return Unit(name, tuple(members), tuple(ranked), variants)


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


def _option(
    config: BackendConfig,
    wanted: RowType,
    grid: Mapping[str, tuple[Any, ...]],
    place: tuple[int, ...],
    variant: str,
    members: Sequence[TableSpec],
    neighbours: Sequence[TableSpec],
) -> Option:
    values = {key: given[i] for (key, given), i in zip(grid.items(), place) if key != ROW_TYPE}
    shown = [f"{key}={value}" for key, value in values.items() if len(grid[key]) > 1]
    rest = tuple((k, repr(v)) for k, v in values.items() if k not in config.size_fields)
    row_type = _shortest(config, wanted, members)
    # A narrow row of a wide type is no smaller size of a wide row of a narrow type. Where a method
    # has no size of its own, types are its sizes.
    kept = ((ROW_TYPE, wanted),) if config.size_fields and wanted != "fp32" else ()
    return Option(
        config=config,
        label=" ".join([variant, *(shown or _sizes(config)), *_named(row_type)]),
        bytes=_bytes(config, row_type, members, neighbours),
        line=(variant, *rest, *kept),
        row_type=row_type,
    )


def _named(row_type: RowType) -> list[str]:
    return [] if row_type == "fp32" else [row_type]


def _shortest(config: BackendConfig, wanted: RowType, tables: Sequence[TableSpec]) -> RowType:
    """The most exact type in which a method's rows are no longer than in the one asked for.

    Raises:
        ConfigError: for a method whose rows get their final form by training.
    """
    if wanted == "fp32":
        return wanted
    if not is_final(config):
        raise ConfigError(
            f"{ROW_TYPE}: {config.name} is trained in another form than it is served in, so that "
            f"its bytes as {wanted} are not known; leave {ROW_TYPE} out, and export its points "
            "with --dtype"
        )
    asked = RowTypes(default=wanted).of_group(config, tables)
    return next(
        each for each in ROW_TYPES if RowTypes(default=each).of_group(config, tables) == asked
    )


def _bytes(
    config: BackendConfig,
    row_type: RowType,
    members: Sequence[TableSpec],
    neighbours: Sequence[TableSpec],
) -> int:
    """Serving bytes; a part by rows of what the whole group would share, if it shares storage."""
    types = RowTypes(default=row_type)
    if not stored_together(config, neighbours):
        return types.footprint(config, members).serve_bytes
    rows = sum(table.num_embeddings for table in members)
    together = types.footprint(config, neighbours).serve_bytes
    return -(-together * rows // sum(table.num_embeddings for table in neighbours))


def _sizes(config: BackendConfig) -> list[str]:
    return [f"{key}={value}" for key, value in config.size.items()]


def _full_option(full: int) -> Option:
    return Option(config=Full(), label=Full.name, bytes=full, line=(Full.name,))


def _fixed_unit(table: TableSpec, config: BackendConfig, wanted: RowType) -> Unit:
    row_type = _shortest(config, wanted, [table])
    label = " ".join([config.name, *_sizes(config), *_named(row_type)])
    size = RowTypes(default=row_type).footprint(config, [table]).serve_bytes
    option = Option(config, label, size, (config.name,), row_type)
    return Unit(table.name, (table,), (option,))


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
        if len(units) > 1 and len(types) > 1 and stored_together(config, tables):
            raise ConfigError(
                f"{ROW_TYPE}: {config.name} stores rows of {', '.join(list(units)[:5])} together, "
                f"and they could differ in their type ({', '.join(sorted(types))}). Give it one "
                f"{ROW_TYPE}, or tie the group (tied: true)"
            )
