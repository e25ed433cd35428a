"""Rows as they will be served: rounded, after training, to what their types can hold.

Training knows float32 rows only. Where a config asks for other types, the weights that a run leaves
are rounded before they are evaluated for its report, so that the figures are those of what is
exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.groups import Group
from embcomp.collection.plan import ResolvedPlan
from embcomp.collection.table_row_types import RowTypes, is_final
from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError
from embcomp.layers.held_pieces import local_pieces
from embcomp.tables.footprint import Footprint
from embcomp.tables.row_types import RowType, pack, served_footprint, unpack
from embcomp.tables.specs import PhysicalTable, TableSpec
from embcomp.training.build import TASK_PREFIX, UnshardedModel

_CHUNK = 1 << 18  # rows that are rounded together


def served_types(config: TrainConfig, info: DatasetInfo) -> RowTypes:
    """The row types that a run asks for.

    Raises:
        ConfigError: for a table that the dataset does not have.
    """
    wanted = RowTypes.of(config.tables.row_types)
    wanted.check(info.categorical_names, "tables.row_types")
    return wanted


def check_served_types(config: TrainConfig, plans: Sequence[ResolvedPlan | None]) -> None:
    """Refuse row types that a run's tables could not be rounded to when they are trained.

    Args:
        config: the run.
        plans: of its embedding tables and its first-order weights.

    Raises:
        ConfigError: for tables that do not exist, share rows in several types, or are served in
            another form than they are trained in.
    """
    wanted = RowTypes.of(config.tables.row_types)
    if wanted.are_fp32:
        return
    names = dict.fromkeys(table.name for plan in plans if plan for table in plan.tables)
    wanted.check(list(names), "tables.row_types")
    groups = [group for plan in plans if plan for group in plan.groups]
    for method, tables in groups:
        if len(method.stages()) > 1 or not _narrow(wanted, tables):
            continue  # a last stage trains what is served
        if not is_final(method):
            raise ConfigError(
                f"tables.row_types: {method.name} serves another form than it trains, so that its "
                "trained rows are not those to be rounded; leave its tables fp32 here, and give "
                "`embcomp export` their type as --dtype"
            )
        wanted.of_group(method, tables)


def _narrow(wanted: RowTypes, tables: Sequence[TableSpec]) -> bool:
    return any(wanted.of_table(table.name) != "fp32" for table in tables)


def served_bytes(collection: CompressedEmbeddingBagCollection, wanted: RowTypes) -> int:
    """Serving bytes of a trained collection, rows in their types."""
    total = Footprint()
    for group in collection.groups:
        types = wanted.of_physical(group.tables, group.backend.physical_tables)
        total += served_footprint(group.config.footprint(group.tables), types)
    return total.serve_bytes


@torch.no_grad()
def round_rows(state: Mapping[str, Any], unsharded: UnshardedModel, wanted: RowTypes) -> None:
    """Round the rows of a model to what their types hold, in place.

    Args:
        state: tensors by their names in a `TrainTask`, whole or sharded by rows.
        unsharded: the model that they belong to, in its serving form.
        wanted: the types.

    Raises:
        ConfigError: for weights that a type cannot hold.
    """
    if wanted.are_fp32:
        return
    for name, (table, row_type) in _physical(unsharded, wanted).items():
        if name in state and row_type != "fp32":
            for piece, (_, first_column) in local_pieces(state[name]):
                assert first_column == 0, "rows are whole, as the config's check demands"
                _round(piece, table.embedding_dim, row_type)


def _physical(
    unsharded: UnshardedModel, wanted: RowTypes
) -> dict[str, tuple[PhysicalTable, RowType]]:
    """Every physical table with its type, by the names that its weight may have in a `TrainTask`."""
    return {
        f"{TASK_PREFIX}{path}.{inner}.embedding_bags.{table.name}.weight": (
            table,
            types[table.name],
        )
        for path, module in unsharded.model.named_modules()
        if isinstance(module, CompressedEmbeddingBagCollection)
        for group in module.groups
        for types in [_types(group, wanted)]
        for table in group.backend.physical_tables
        for inner in ("rows", "unpooled_rows")
    }


def _types(group: Group, wanted: RowTypes) -> dict[str, RowType]:
    assert group.config.is_serving_form or not _narrow(wanted, group.tables), (
        f"the last stage leaves {group.config.name}, which is not what is served"
    )
    return wanted.of_physical(group.tables, group.backend.physical_tables)


def _round(piece: Tensor, dim: int, row_type: RowType) -> None:
    """Round (rows, padded dim) weights; padding stays as it is."""
    for start in range(0, len(piece), _CHUNK):
        own = piece[start : start + _CHUNK, :dim]
        own.copy_(unpack(pack(own.float().cpu(), row_type), dim, row_type))
