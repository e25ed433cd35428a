"""TorchRec's planner as `plan`, a search and training ask it: one sharder, topology and reserve.

They differ in what they know, never in what they ask: a plan describes devices that need not be
there and tables on `meta`; training knows its devices. So what `plan` accepts, training places.

What the planner does not see is subtracted from a device's memory first: the reserve for dense
layers and activations, and what methods hold beside their rows, such as codes: all of it on every
device, or a chunk of it where it is sharded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    PlannerError,
    PlannerErrorType,
    ShardingOption,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from typing_extensions import override

from embcomp.backends.base import BackendConfig
from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.errors import EmbcompError
from embcomp.layers.shardable_buffers import shardable
from embcomp.planning.enumerator import SharingEnumerator
from embcomp.planning.proposers import proposers
from embcomp.tables.budget import SHARD_CODES_ABOVE, parse_budget, reserved_bytes
from embcomp.tables.footprint import RowOptimizer
from embcomp.tables.specs import TableSpec, splits_by_rows

Device = Literal["cpu", "cuda"]

SHARDING = ("table_wise", "row_wise")
"""What may be chosen from by default; row-wise splits a table that is too big for one device."""


class PlacementError(EmbcompError):
    """The planner found no way to put the tables on the devices."""


@dataclass(frozen=True, kw_only=True)
class PlacementRequest:
    """What the planner is asked.

    Args:
        world_size: number of ranks.
        device_memory: bytes of one device.
        device: kind of device.
        optimizer: row optimizer, whose state is counted.
        batch_size: rows of a batch on one rank.
        reserved: bytes of one device kept for everything else: dense layers, activations.
        sharding: TorchRec's sharding types to choose from.
        pooling_factors: mean number of ids in a bag, for each key of a physical table.
        local_world_size: ranks of one host; None when all are on one.
        reserve: how the reserve was written, where a share of a device is meant.
        shard_codes_above: bytes up to which a table's codes, bitmaps and pointers are on every rank;
            larger ones are sharded.
    """

    world_size: int
    device_memory: int
    device: Device = "cuda"
    optimizer: RowOptimizer = "rowwise_adagrad"
    batch_size: int = 1
    reserved: int = 0
    sharding: Sequence[str] = SHARDING
    pooling_factors: Mapping[str, float] = field(default_factory=dict)
    local_world_size: int | None = None
    reserve: str | int | None = None
    shard_codes_above: int = parse_budget(SHARD_CODES_ABOVE)

    def __post_init__(self) -> None:
        for name, value in (
            ("world_size", self.world_size),
            ("device_memory", self.device_memory),
            ("batch_size", self.batch_size),
        ):
            if value < 1:
                raise PlacementError(f"{name}: expected a positive number, got {value}")
        if self.reserved >= self.device_memory:
            raise PlacementError(
                f"reserved: {self.reserved:,} bytes leave nothing of a device's "
                f"{self.device_memory:,} bytes"
            )

    def with_memory(self, memory: int) -> PlacementRequest:
        """The same with devices of another size, and a reserve that goes with it."""
        kept = self.reserved if self.reserve is None else reserved_bytes(self.reserve, memory)
        return replace(self, device_memory=memory, reserved=kept)


class RowSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder; on CPU it also offers row-wise plans, where the kernels work."""

    @override
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [kind.value for kind in ShardingType]

    @override
    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        # No unified-memory kernels: they would move tables to host memory without being asked.
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return [EmbeddingComputeKernel.DENSE.value]
        return [EmbeddingComputeKernel.FUSED.value]


@dataclass(frozen=True)
class FoundPlan:
    """What the planner answers.

    Args:
        plan: for TorchRec.
        options: the same with bytes.
    """

    plan: ShardingPlan
    options: Sequence[ShardingOption]


def find_plan(
    model: nn.Module, query: PlacementRequest, sharder: RowSharder | None = None
) -> FoundPlan:
    """Ask TorchRec's planner for a placement of the collections inside a model.

    Args:
        model: unsharded; row optimizers are attached, so that their state is counted.
        query: devices and memory.
        sharder: that of the training to come.

    Raises:
        PlacementError: when the tables cannot be placed; the text says why.
    """
    beside = beside_rows(model, query).on_each
    if query.device_memory - query.reserved <= beside:
        raise PlacementError(_reason(query, beside))
    constraints = _constraints(model, query)
    # Which placement is best depends on hosts; whether there is one does not.
    for host in dict.fromkeys((query.local_world_size or query.world_size, query.world_size)):
        topology = topology_of(replace(query, local_world_size=host), beside)
        planner = EmbeddingShardingPlanner(
            topology=topology,
            batch_size=query.batch_size,
            enumerator=SharingEnumerator(
                topology=topology, batch_size=query.batch_size, constraints=constraints
            ),
            constraints=constraints,
            proposer=proposers(),
            stats=[],
            debug=False,
            storage_reservation=FixedPercentageStorageReservation(0.0),
        )
        plan = _planned(planner, model, sharder or RowSharder())
        if plan is not None:
            return FoundPlan(plan, planner._best_plan or ())
    raise PlacementError(_reason(query, beside))


def _planned(
    planner: EmbeddingShardingPlanner, model: nn.Module, sharder: RowSharder
) -> ShardingPlan | None:
    """The planner's answer; None when the tables do not fit."""
    with quiet():
        try:
            return planner.plan(model, [sharder])
        except PlannerError as error:
            # A single table too large for every device is reported as a broken constraint.
            if error.error_type not in (
                PlannerErrorType.INSUFFICIENT_STORAGE,
                PlannerErrorType.STRICT_CONSTRAINTS,
            ):
                raise
            return None
        except RuntimeError as error:
            raise PlacementError(f"no placement: {error}") from None


def _reason(query: PlacementRequest, beside: int) -> str:
    kept = f", {query.reserved:,} of each reserved" if query.reserved else ""
    kept += f", beside {beside:,} bytes of codes and the like on each" if beside else ""
    return (
        f"the tables, their {query.optimizer} state and buffers do not fit on {query.world_size} "
        f"x {query.device_memory:,} bytes of {query.device} memory{kept} "
        f"({', '.join(query.sharding)})"
    )


@dataclass(frozen=True, kw_only=True)
class BesideRows:
    """Bytes that the planner does not see: codes, bitmaps, pointers, codewords.

    Attributes:
        on_each: on every device.
        sharded: how many of these are its share of what is sharded.
        tables: whose codes, bitmaps and pointers are sharded.
    """

    on_each: int = 0
    sharded: int = 0
    tables: tuple[str, ...] = ()

    def __add__(self, other: BesideRows) -> BesideRows:
        return BesideRows(
            on_each=self.on_each + other.on_each,
            sharded=self.sharded + other.sharded,
            tables=self.tables + other.tables,
        )


def beside_rows(model: nn.Module, query: PlacementRequest) -> BesideRows:
    """What each device holds beside the rows of the collections inside a model."""
    found = BesideRows()
    for module in model.modules():
        if isinstance(module, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection):
            for group in module.groups:
                found += beside_rows_of(group.config, group.tables, group.backend.route, query)
    return found


def beside_rows_of(
    config: BackendConfig, tables: Sequence[TableSpec], route: nn.Module, query: PlacementRequest
) -> BesideRows:
    """What each device holds beside the rows of some tables.

    Args:
        config: their method.
        tables: the tables.
        route: as the method builds it, on any device.
        query: the number of ranks, and what is sharded over them.
    """
    whole = config.dense_footprint(tables).train_weight_bytes
    if query.world_size == 1:
        return BesideRows(on_each=whole)
    ranks, above = query.world_size, query.shard_codes_above
    parts = list(shardable(route))
    return BesideRows(
        on_each=whole - sum(part.saved_bytes(ranks, above) for part in parts),
        sharded=sum(part.sharded_bytes(ranks, above) for part in parts),
        tables=tuple(table for part in parts for table in part.larger_than(above)),
    )


def topology_of(query: PlacementRequest, beside: int = 0) -> Topology:
    """The devices with the memory that tables may use.

    Args:
        query: devices.
        beside: bytes on every device that belong to no table.
    """
    memory = query.device_memory - query.reserved - beside
    on_cpu = query.device == "cpu"
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=query.world_size,
            local_world_size=query.local_world_size or query.world_size,
            ddr_cap_bytes=memory if on_cpu else 0,
            hbm_cap_bytes=0 if on_cpu else memory,
        ),
        kernel_config=KernelConfig(compute_device=query.device),
    )


def row_collections(model: nn.Module) -> Iterator[tuple[str, EmbeddingBagCollection]]:
    """Every TorchRec collection inside an unsharded model, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            yield path, module


def pooling_factors(model: nn.Module, mean_lengths: Mapping[str, float]) -> dict[str, float]:
    """Mean bag length for each physical look-up of a model.

    Args:
        model: unsharded.
        mean_lengths: by feature; 1 for those that are not named.
    """
    return {
        key: mean_lengths.get(feature, 1.0)
        for module in model.modules()
        if isinstance(module, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection)
        for key, feature in module.lookup_features().items()
    }


def _constraints(model: nn.Module, query: PlacementRequest) -> dict[str, ParameterConstraints]:
    return {
        config.name: ParameterConstraints(
            sharding_types=allowed_sharding(
                config.num_embeddings, query.sharding, query.world_size
            ),
            min_partition=config.embedding_dim
            // column_pieces(config.embedding_dim, query.world_size),
            pooling_factors=[query.pooling_factors.get(key, 1.0) for key in config.feature_names],
        )
        for _, collection in row_collections(model)
        for config in collection.embedding_bag_configs()
    }


def allowed_sharding(num_embeddings: int, sharding: Sequence[str], world_size: int) -> list[str]:
    """Those sharding types that a table of so many rows can have."""
    if splits_by_rows(num_embeddings, world_size):
        return list(sharding)
    return [kind for kind in sharding if kind != "row_wise"] or ["table_wise"]


def column_pieces(embedding_dim: int, world_size: int) -> int:
    """Into how many parts of one width a table is split by columns.

    Fused kernels want parts of a multiple of 4 columns; a width that has none stays whole.
    """
    return max(n for n in range(1, world_size + 1) if n == 1 or embedding_dim % (4 * n) == 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the planner's log lines about tables that have no sharding spec."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
