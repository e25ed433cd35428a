"""Methods as built for their tables, and the (table, feature) pairs that come out of a collection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embcomp.backends.base import Backend, BackendConfig
from embcomp.tables.specs import TableSpec


@dataclass(frozen=True, kw_only=True)
class TableFeature:
    """One feature of one table: what comes out of a collection under one key."""

    feature: str
    table: TableSpec
    key: str


def table_features(tables: Sequence[TableSpec]) -> list[TableFeature]:
    """The (table, feature) pairs in order, keyed as TorchRec keys them.

    The key is the feature, or ``feature@table`` when the feature is in several tables.
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
    """A method as built for its tables, and whether it needs its rows unpooled."""

    config: BackendConfig
    tables: Sequence[TableSpec]
    backend: Backend
    instances: Sequence[TableFeature]
    unpooled: bool

    @property
    def width(self) -> int:
        """Columns of the rows that ``combine`` takes."""
        dims = {key: t.embedding_dim for t in self.backend.physical_tables for key in t.keys}
        return sum(dims[key] for key in self.backend.keys)
