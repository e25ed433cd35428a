"""What trained and serving collections share: a plan's methods as children of one module.

`route`, `rows` and `combine` are called one after another. Their names, and those of the physical
tables, are the format of checkpoints; how rows are held is each collection's own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
)

from embcomp.backends.base import BackendConfig
from embcomp.collection.combine import Combine, PooledCombine, UnpooledCombine
from embcomp.collection.groups import Group, TableFeature, group_labels, table_features
from embcomp.collection.plan import ResolvedPlan
from embcomp.collection.route import CompositeRoute
from embcomp.errors import ConfigError
from embcomp.tables.specs import TableSpec

HoldRows = Callable[[Sequence[Group]], nn.Module]


def build_groups(plan: ResolvedPlan, *, unpooled: bool) -> list[Group]:
    """The methods of a plan, built for their tables.

    Args:
        plan: the method of every table.
        unpooled: whether all methods' rows are looked up one by one, not only those that need it.
    """
    instances = table_features(plan.tables)
    groups = [
        Group(
            label=label,
            config=config,
            tables=(own := _in_order(config, tables, plan.tables)),
            backend=(backend := config.build(own)),
            instances=[i for table in own for i in instances if i.table == table],
            unpooled=unpooled or backend.needs_unpooled_rows,
        )
        for label, (config, tables) in zip(group_labels(plan.groups), plan.groups)
    ]
    names = [table.name for group in groups for table in group.backend.physical_tables]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"physical tables {', '.join(twice)} clash; rename the logical ones, or give methods "
            "that share rows among their tables another seed"
        )
    return groups


def _in_order(
    config: BackendConfig, tables: Sequence[TableSpec], declared: Sequence[TableSpec]
) -> list[TableSpec]:
    """A group's tables as its parts have them: as declared, so that no keys need be permuted, if they may."""
    if config.joins(tables):
        return list(tables)
    names = {table.name for table in tables}
    return [table for table in declared if table.name in names]


class AssembledTables(nn.Module):
    """The methods of a plan as `route`, rows and `combine`."""

    route: CompositeRoute
    rows: Any  # what holds the rows of pooled look-ups; None without any
    unpooled_rows: Any  # the same for look-ups in bags of one
    combine: Combine

    unpooled: ClassVar[bool]
    """Whether every id gets an embedding, rather than every bag."""
    torchrec_kind: ClassVar[str]
    """What TorchRec's own collection calls the child that holds its tables."""

    def _assemble(
        self,
        declared: Sequence[TableSpec],
        plan: ResolvedPlan,
        groups: Sequence[Group],
        hold_rows: HoldRows,
        *,
        device: torch.device,
        is_weighted: bool = False,
        need_indices: bool = False,
    ) -> None:
        """Make the children.

        Args:
            declared: the logical tables in the order of the output.
            plan: the method of every table.
            groups: the methods as built.
            hold_rows: makes what holds the rows of some methods, which have physical tables.
            device: where the rows are.
            is_weighted: whether ids carry weights.
            need_indices: whether the ids go along with embeddings of single ids.
        """
        self._declared, self._plan, self._groups = list(declared), plan, list(groups)
        self._device, self._is_weighted, self._need_indices = device, is_weighted, need_indices
        self.route = CompositeRoute(groups, is_weighted=is_weighted, unpooled=self.unpooled)
        self.rows = _rows([group for group in groups if not group.unpooled], hold_rows)
        self.unpooled_rows = _rows([group for group in groups if group.unpooled], hold_rows)
        self.combine = self._make_combine(table_features(declared))

    def _make_combine(self, instances: Sequence[TableFeature]) -> Combine:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the tables were built."""
        return self._device

    @property
    def is_weighted_lookup(self) -> bool:
        """Whether ids must carry weights."""
        return self._is_weighted

    @property
    def plan(self) -> ResolvedPlan:
        """The method of every table, all sizes fixed."""
        return self._plan

    @property
    def groups(self) -> list[Group]:
        """The methods as built, each with its tables."""
        return list(self._groups)


class PooledTables(AssembledTables, EmbeddingBagCollectionInterface):
    """One embedding for every bag, where TorchRec's EmbeddingBagCollection is used."""

    unpooled: ClassVar[bool] = False
    torchrec_kind: ClassVar[str] = "embedding_bags"
    _configs: list[EmbeddingBagConfig]

    def _make_combine(self, instances: Sequence[TableFeature]) -> Combine:
        return PooledCombine(self._groups, instances)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The logical tables, as declared."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether ids carry weights."""
        return self._is_weighted


class UnpooledTables(AssembledTables, EmbeddingCollectionInterface):
    """One embedding for every id, where TorchRec's EmbeddingCollection is used."""

    unpooled: ClassVar[bool] = True
    torchrec_kind: ClassVar[str] = "embeddings"
    _configs: list[EmbeddingConfig]

    def _make_combine(self, instances: Sequence[TableFeature]) -> Combine:
        return UnpooledCombine(self._groups, instances, need_indices=self._need_indices)

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The logical tables, as declared."""
        return self._configs

    def need_indices(self) -> bool:
        """Whether the ids go along."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """Width of every embedding."""
        return self._configs[0].embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        """Output keys of each table."""
        instances = table_features(self._declared)
        return [[i.key for i in instances if i.table is table] for table in self._declared]


def _rows(groups: Sequence[Group], hold_rows: HoldRows) -> nn.Module | None:
    has_tables = any(group.backend.physical_tables for group in groups)
    return hold_rows(groups) if has_tables else None
