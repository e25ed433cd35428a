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
from embcomp.search.config import GroupConfig, RowBand, SearchConfig
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
    """

    config: BackendConfig
    label: str
    bytes: int
    line: tuple[object, ...]


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
        full = [i for i, option in enumerate(self.options) if isinstance(option.config, Full)]
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
        (method,) = choice.configs(base.tables.embedding_dim).values()
        units.append(_fixed_unit(left.pop(name), method))
    for group in sorted(config.groups, key=lambda group: group.tables == "all"):
        tables = list(_members(group, left))
        if not tables:
            raise ConfigError(f"groups: no table is left for {_described(group)}")
        for table in tables:
            del left[table.name]
        for members in [tables] if group.tied else [[table] for table in tables]:
            units.append(_unit(group, members, tables, base, dropped))
    units += [_fixed_unit(table, _of_recipe(base, table)) for table in left.values()]
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
        for place, config in choice.configs(base.tables.embedding_dim).items():
            option = _option(config, grid, place, variant, members, neighbours)
            if option.bytes >= full and not isinstance(config, Full):
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
    grid: Mapping[str, tuple[Any, ...]],
    place: tuple[int, ...],
    variant: str,
    members: Sequence[TableSpec],
    neighbours: Sequence[TableSpec],
) -> Option:
    values = {key: given[i] for (key, given), i in zip(grid.items(), place)}
    shown = [f"{key}={value}" for key, value in values.items() if len(grid[key]) > 1]
    rest = tuple((k, repr(v)) for k, v in values.items() if k not in config.size_fields)
    return Option(
        config=config,
        label=" ".join([variant, *(shown or _sizes(config))]),
        bytes=_bytes(config, members, neighbours),
        line=(variant, *rest),
    )


def _bytes(
    config: BackendConfig, members: Sequence[TableSpec], neighbours: Sequence[TableSpec]
) -> int:
    """Serving bytes; a part by rows of what the whole group would share, if it shares storage."""
    if not stored_together(config, neighbours):
        return config.footprint(members).serve_bytes
    rows = sum(table.num_embeddings for table in members)
    together = config.footprint(neighbours).serve_bytes
    return -(-together * rows // sum(table.num_embeddings for table in neighbours))


def _sizes(config: BackendConfig) -> list[str]:
    return [f"{key}={value}" for key, value in config.size.items()]


def _full_option(full: int) -> Option:
    return Option(config=Full(), label=Full.name, bytes=full, line=(Full.name,))


def _fixed_unit(table: TableSpec, config: BackendConfig) -> Unit:
    label = " ".join([config.name, *_sizes(config)])
    size = config.footprint([table]).serve_bytes
    option = Option(config, label, size, (config.name,))
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
