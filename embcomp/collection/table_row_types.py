"""Row types table by table: what a person asks for, and what a method's physical tables get of it.

Asked for is one type, or a mapping from tables to types in which `default` stands for the others.
A physical table that holds rows of several tables has one type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from embcomp.backends.base import BackendConfig, full_table
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import did_you_mean, listed
from embcomp.tables.footprint import Footprint
from embcomp.tables.row_types import (
    ROW_TYPES,
    RowType,
    check_row_type,
    row_types,
    served_footprint,
)
from embcomp.tables.specs import PhysicalTable, TableSpec

DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class RowTypes:
    """The row type that each table is to be served in.

    Args:
        default: of tables that are not named.
        tables: of single tables, by name.
    """

    default: RowType = "fp32"
    tables: Mapping[str, RowType] = field(default_factory=dict)

    @classmethod
    def of(cls, wanted: str | Mapping[str, str] | RowTypes) -> RowTypes:
        """Read the short forms: one type, or types by table.

        Raises:
            ConfigError: for a type that does not exist.
        """
        if isinstance(wanted, RowTypes):
            return wanted
        if isinstance(wanted, str):
            return cls(default=check_row_type(wanted))
        own = {name: check_row_type(type_) for name, type_ in wanted.items()}
        return cls(default=own.pop(DEFAULT, "fp32"), tables=own)

    @classmethod
    def parse(cls, text: str) -> RowTypes:
        """Read `int8`, `C1=int8,C2=fp16` or `int8,C3=fp32`.

        Raises:
            ConfigError: for anything else.
        """
        found: dict[str, str] = {}
        for part in text.split(","):
            name, equals, type_ = part.strip().rpartition("=")
            key = name.strip() if equals else DEFAULT
            if not key or key in found or (equals and key == DEFAULT):
                raise ConfigError(
                    f"--dtype: expected a type, TABLE=TYPE, or several with commas, each table "
                    f"once, as int8,C3=fp32; got {text!r}"
                )
            found[key] = type_.strip()
        return cls.of(found)

    @property
    def are_fp32(self) -> bool:
        """Whether all rows are served as float32."""
        return self.default == "fp32" and set(self.tables.values()) <= {"fp32"}

    def of_table(self, name: str) -> RowType:
        """The type asked for a table."""
        return self.tables.get(name, self.default)

    def used(self, names: Iterable[str]) -> list[RowType]:
        """The types asked for any of these tables, from the most exact to the narrowest."""
        asked = {self.of_table(name) for name in names}
        return [each for each in ROW_TYPES if each in asked]

    def plain(self) -> RowType | dict[str, RowType]:
        """As `of` reads it: one type where that says it, else a mapping."""
        own = {name: type_ for name, type_ in self.tables.items() if type_ != self.default}
        return {DEFAULT: self.default, **own} if own else self.default

    def __str__(self) -> str:
        return ",".join([self.default, *(f"{n}={t}" for n, t in self.tables.items())])

    def check(self, names: Sequence[str], source: str = "row_type") -> None:
        """Refuse types of tables that do not exist.

        Args:
            names: the tables that there are.
            source: where the types stand, for errors.
        """
        for name in self.tables:
            if name not in names:
                raise ConfigError(
                    f"{source}: no table is called {name!r}{did_you_mean(name, names)}; "
                    f"the tables are {listed(names)}"
                )

    def of_physical(
        self, tables: Sequence[TableSpec], physical: Sequence[PhysicalTable]
    ) -> dict[str, RowType]:
        """The type in which each physical table of a method is served.

        Args:
            tables: the logical tables that the method holds.
            physical: its physical tables.

        Raises:
            ConfigError: where tables that share a physical one are to have several types.
        """
        found: dict[str, RowType] = {}
        for table in physical:
            owners = _owners(table, tables)
            wanted = {owner.name: self.of_table(owner.name) for owner in owners}
            got = {name: row_types([table], type_)[table.name] for name, type_ in wanted.items()}
            if len(set(got.values())) > 1:
                shown = [f"{name}={type_}" for name, type_ in list(wanted.items())[:5]]
                more = f" and {len(wanted) - 5} more" if len(wanted) > 5 else ""
                raise ConfigError(
                    f"row types: tables that share stored rows ({table.name}) have one type; got "
                    f"{listed(shown)}{more}. Give them the same type, or other methods"
                )
            found[table.name] = next(iter(got.values()))
        return found

    def of_group(self, config: BackendConfig, tables: Sequence[TableSpec]) -> dict[str, RowType]:
        """The same, of a method's physical tables as they will be built for these tables."""
        small = [table for table in tables if not config.keeps_full(table)]
        physical = [full_table(table) for table in tables if config.keeps_full(table)]
        physical += config.physical_tables(small) if small else []
        return self.of_physical(tables, physical)

    def footprint(self, config: BackendConfig, tables: Sequence[TableSpec]) -> Footprint:
        """A method's footprint for these tables, rows served in their types.

        A method that is served in another form than it is described by is billed for float32
        rows, which is a bound.
        """
        whole = config.footprint(tables)
        if all(self.of_table(table.name) == "fp32" for table in tables) or not is_final(config):
            return whole
        return served_footprint(whole, self.of_group(config, tables))


FP32 = RowTypes()
"""Rows served as they are trained."""


def is_final(config: BackendConfig) -> bool:
    """Whether a method's rows are served as they are trained, in one stage, but for their type."""
    return len(config.stages()) == 1 and config.is_serving_form


def _owners(table: PhysicalTable, tables: Sequence[TableSpec]) -> list[TableSpec]:
    """The tables whose rows a physical one holds; where its look-ups do not say, all."""
    names = {lookup.table for lookup in table.lookups}
    return [spec for spec in tables if spec.name in names] or list(tables)
