"""The ways in which tables can be stored: what a unit of tables may choose from, and its bytes.

Options are sorted by bytes. One that would not be smaller than the full table is dropped; the full
table stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from embcomp.backends.base import BackendConfig
from embcomp.collection.plan import UNCOMPRESSED
from embcomp.collection.table_row_types import RowTypes, is_final
from embcomp.config.train_config import TrainConfig
from embcomp.errors import ConfigError
from embcomp.search.config.choices import ROW_TYPE, GroupConfig
from embcomp.tables.row_types import ROW_TYPES, RowType
from embcomp.tables.specs import TableSpec


@dataclass(frozen=True)
class Option:
    """One way to store a unit.

    Args:
        config: the method.
        label: for people, as `hash ratio=0.1`.
        bytes: serving bytes of the unit's tables; their part, where others share the storage.
        family: what does not change when only the size does; shrinking keeps to a line if it can.
        row_type: what its rows are served in; the most exact type of those that are no longer.
    """

    config: BackendConfig
    label: str
    bytes: int
    family: tuple[object, ...]
    row_type: RowType = "fp32"

    @property
    def is_full(self) -> bool:
        """Whether it is the uncompressed table."""
        return not self.config.compresses and self.row_type == "fp32"


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
            same = [i for i, other in enumerate(self.options) if other.family == option.family]
            lines.append(tuple(sorted({*same, *full})))
        return tuple(lines)


def unit_of(
    group: GroupConfig,
    members: list[TableSpec],
    neighbours: list[TableSpec],
    base: TrainConfig,
    notes: list[tuple[str, str]],
) -> Unit:
    """A unit with all options of its group's choices.

    Args:
        group: the choices.
        members: the unit's tables.
        neighbours: the group's tables, with which some methods share what they store.
        base: the training recipe.
        notes: gets the unit's name with the label of each option that is dropped.
    """
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
            same = [
                o for o in options.values() if (o.family, o.bytes) == (option.family, option.bytes)
            ]
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
        family=(variant, *rest, *kept),
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
    if not config.stores_together(neighbours):
        return types.footprint(config, members).serve_bytes
    rows = sum(table.num_embeddings for table in members)
    together = types.footprint(config, neighbours).serve_bytes
    return -(-together * rows // sum(table.num_embeddings for table in neighbours))


def _sizes(config: BackendConfig) -> list[str]:
    return [f"{key}={value}" for key, value in config.size.items()]


def _full_option(full: int) -> Option:
    name = UNCOMPRESSED.name
    return Option(config=UNCOMPRESSED, label=name, bytes=full, family=(name,))


def fixed_unit(table: TableSpec, config: BackendConfig, wanted: RowType) -> Unit:
    """A table whose method is not searched."""
    row_type = _shortest(config, wanted, [table])
    label = " ".join([config.name, *_sizes(config), *_named(row_type)])
    size = RowTypes(default=row_type).footprint(config, [table]).serve_bytes
    option = Option(config, label, size, (config.name,), row_type)
    return Unit(table.name, (table,), (option,))
