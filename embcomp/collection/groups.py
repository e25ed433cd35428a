"""Methods as built for their tables, and the (table, feature) pairs that come out of a collection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from embcomp.backends.base import Backend, BackendConfig
from embcomp.tables.specs import PhysicalTable, TableSpec


@dataclass(frozen=True, kw_only=True)
class TableFeature:
    """One feature of one table: what comes out of a collection under one key."""

    feature: str
    table: TableSpec
    key: str

    @property
    def pair(self) -> tuple[str, str]:
        """The names of table and feature, which say what is looked up; a table may show it twice."""
        return self.table.name, self.feature


def table_features(tables: Sequence[TableSpec]) -> list[TableFeature]:
    """The (table, feature) pairs in order, keyed as TorchRec keys them.

    The key is the feature, or `feature@table` when the feature is in several tables.
    """
    features = [feature for table in tables for feature in table.feature_names]
    return [
        TableFeature(
            feature=feature,
            table=table,
            key=feature if features.count(feature) == 1 else f"{feature}@{table.name}",
        )
        for table in tables
        for feature in table.feature_names
    ]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A method as built for its tables: in the order declared, or of their names where they share state.

    Args:
        label: what its modules are called in the collection.
        config: the method.
        tables: its tables.
        backend: its parts.
        instances: the (table, feature) pairs, in the order in which its parts have them.
        unpooled: whether it needs its rows unpooled.
    """

    label: str
    config: BackendConfig
    tables: Sequence[TableSpec]
    backend: Backend
    instances: Sequence[TableFeature]
    unpooled: bool

    @property
    def width(self) -> int:
        """Columns of the rows that `combine` takes."""
        dims = {key: t.embedding_dim for t in self.backend.physical_tables for key in t.keys}
        return sum(dims[key] for key in self.backend.keys)

    def modules(self) -> list[tuple[str, nn.Module]]:
        """The method's own modules: `route` and `combine`."""
        return [("route", self.backend.route), ("combine", self.backend.combine)]

    def looked_up_in(self, physical: PhysicalTable) -> list[str]:
        """The tables whose ids are looked up in a physical one."""
        there = {key.table for key in physical.lookups}
        return [table.name for table in self.tables if table.name in there]

    def rows_name(self, physical: str) -> str:
        """What a physical table's rows are called in the collection's state dict."""
        return f"{'unpooled_rows' if self.unpooled else 'rows'}.embedding_bags.{physical}.weight"

    def state_name(self, part: str, name: str) -> str:
        """What a tensor of `route` or `combine` is called in the collection's state dict."""
        return f"{part}.{part}s.{self.label}.{name}"


def group_labels(groups: Sequence[tuple[BackendConfig, Sequence[TableSpec]]]) -> list[str]:
    """What the modules of methods are called: their name, and a table's where there are several.

    Nothing depends on the order of tables, and little on which there are.
    """
    count = Counter(config.name for config, _ in groups)
    return [
        config.name if count[config.name] == 1 else f"{config.name}@{tables[0].name}"
        for config, tables in groups
    ]
