"""Where TorchRec's planner would put the tables, asked without devices, ranks or allocation.

The planner sees modules on ``meta`` and a topology that is only described, so a billion rows cost
no more than ten. What it does not see is subtracted first: pass it as ``reserved``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn
from torch.distributed.optim import (  # type: ignore[attr-defined]
    _apply_optimizer_in_backward,
)
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
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
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad

from embcomp.errors import EmbcompError
from embcomp.planning.proposers import proposers
from embcomp.tables.budget import largest_int
from embcomp.tables.footprint import RowOptimizer
from embcomp.tables.specs import splits_by_rows

Device = Literal["cpu", "cuda"]

SHARDING = ("table_wise", "row_wise")
"""What may be chosen from by default; row-wise splits a table that is too big for one device."""

TableShape = tuple[int, int, int, tuple[float, ...]]
"""All of a table that the planner's bytes depend on: rows, width, bytes of a weight, bag lengths."""

_OPTIMIZERS: dict[RowOptimizer, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
}


class PlacementError(EmbcompError):
    """The planner found no way to put the tables on the devices."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One table's part on one rank.

    Args:
        table: the physical table.
        rank: where it lies.
        sharding: TorchRec's word for the split.
        rows: rows of the part.
        columns: columns of the part, padding included.
        weight_bytes: the part itself.
        optimizer_bytes: its row optimizer's state.
        buffer_bytes: the planner's estimate of input and output buffers.
    """

    table: str
    rank: int
    sharding: str
    rows: int
    columns: int
    weight_bytes: int
    optimizer_bytes: int
    buffer_bytes: int

    @property
    def bytes(self) -> int:
        """What the planner counts against the device."""
        return self.weight_bytes + self.optimizer_bytes + self.buffer_bytes


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A placement of all tables.

    Args:
        world_size: number of ranks.
        device_memory: bytes of one device.
        reserved: bytes of one device that tables may not use.
        shards: all parts, by rank.
    """

    world_size: int
    device_memory: int
    reserved: int
    shards: tuple[Shard, ...]

    def on_rank(self, rank: int) -> list[Shard]:
        """The parts on one rank."""
        return [shard for shard in self.shards if shard.rank == rank]

    def bytes_per_rank(self) -> list[int]:
        """Bytes on each rank, the reserved ones left out."""
        totals = [0] * self.world_size
        for shard in self.shards:
            totals[shard.rank] += shard.bytes
        return totals


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
    """

    world_size: int
    device_memory: int
    device: Device = "cuda"
    optimizer: RowOptimizer = "rowwise_adagrad"
    batch_size: int = 1
    reserved: int = 0
    sharding: Sequence[str] = SHARDING
    pooling_factors: Mapping[str, float] = field(default_factory=dict)

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


class _EveryType(EmbeddingBagCollectionSharder):
    """On CPU the stock sharder hides row-wise splits from the planner, though they run."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [kind.value for kind in ShardingType]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        # No unified-memory kernels: they would move tables to host memory without being asked.
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return [EmbeddingComputeKernel.DENSE.value]
        return [EmbeddingComputeKernel.FUSED.value]


def attach_optimizer(tables: nn.Module, optimizer: RowOptimizer) -> None:
    """Makes the planner count an optimizer's state on every table of a ``meta`` module."""
    _apply_optimizer_in_backward(_OPTIMIZERS[optimizer], tables.parameters(), {"lr": 0.1})


def place(tables: nn.Module, query: PlacementRequest) -> Placement:
    """Asks TorchRec's planner for a placement.

    Args:
        tables: modules on ``meta`` that hold EmbeddingBagCollections; each asked once, as the
            optimizer is attached to them.
        query: devices and memory.

    Raises:
        PlacementError: when the tables cannot be placed; the text says why.
    """
    attach_optimizer(tables, query.optimizer)
    return _ask(tables, query)


def smallest_memory(tables: nn.Module, query: PlacementRequest, most: int) -> int | None:
    """The least memory per device, to about 2 %, for which a placement exists; None if none is.

    Args:
        tables: as for ``place``, the optimizer attached already.
        query: devices; its memory is replaced.
        most: bytes per device beyond which not to look.
    """
    steps = 64
    found = largest_int(lambda down: _fits(tables, query, most * (steps - down) // steps), 0, 63)
    return None if found is None else most * (steps - found) // steps


def smallest_world(tables: nn.Module, query: PlacementRequest, most: int = 1024) -> int | None:
    """The least number of ranks, doubling from the query's, for which a placement exists."""
    world = query.world_size * 2
    while world <= most:
        if _fits(tables, replace(query, world_size=world), query.device_memory):
            return world
        world *= 2
    return None


def row_wise_bytes(tables: Sequence[TableShape], query: PlacementRequest) -> list[tuple[int, ...]]:
    """What the planner counts on each rank for tables that are split row-wise, table by table.

    A table's bytes do not depend on its neighbours, so they may be added up. One with too few rows
    to be split counts in full on every rank, as it may lie on any of them.

    Args:
        tables: rows, width, bytes of a weight and the mean bag length of each look-up.
        query: devices; its pooling factors are not looked at.
    """
    types = {4: DataType.FP32, 2: DataType.FP16}
    configs = [
        EmbeddingBagConfig(
            name=f"t{i}",
            num_embeddings=rows,
            embedding_dim=width,
            feature_names=[f"t{i}_{k}" for k in range(len(lengths))],
            data_type=types[itemsize],
        )
        for i, (rows, width, itemsize, lengths) in enumerate(tables)
    ]
    module = nn.ModuleDict(
        {"rows": EmbeddingBagCollection(tables=configs, device=torch.device("meta"))}
    )
    attach_optimizer(module, query.optimizer)
    constraints = {
        f"t{i}": ParameterConstraints(
            sharding_types=_allowed(rows, ["row_wise"], query), pooling_factors=list(lengths)
        )
        for i, (rows, _, _, lengths) in enumerate(tables)
    }
    with _quiet():
        options = EmbeddingEnumerator(
            topology=_topology(query), batch_size=query.batch_size, constraints=constraints
        ).enumerate(module, [_EveryType()])
    by_name = {option.name: option for option in options}
    found = []
    for config in configs:
        storages = [shard.storage for shard in by_name[config.name].shards]
        sizes = [each.ddr if query.device == "cpu" else each.hbm for each in storages]
        found.append(tuple(sizes * query.world_size if len(sizes) == 1 else sizes))
    return found


def _fits(tables: nn.Module, query: PlacementRequest, memory: int) -> bool:
    if memory <= query.reserved:
        return False
    try:
        _ask(tables, replace(query, device_memory=memory))
    except PlacementError:
        return False
    return True


def _ask(tables: nn.Module, query: PlacementRequest) -> Placement:
    planner = EmbeddingShardingPlanner(
        topology=_topology(query),
        batch_size=query.batch_size,
        constraints=_constraints(tables, query),
        proposer=proposers(),
        stats=[],
        debug=False,
        storage_reservation=FixedPercentageStorageReservation(0.0),
    )
    with _quiet():
        try:
            planner.plan(tables, [_EveryType()])
        except PlannerError as error:
            # A single table too large for every device is reported as a broken constraint.
            if error.error_type not in (
                PlannerErrorType.INSUFFICIENT_STORAGE,
                PlannerErrorType.STRICT_CONSTRAINTS,
            ):
                raise
            raise PlacementError(_reason(query)) from None
        except RuntimeError as error:
            raise PlacementError(f"no placement: {error}") from None
    shards = [shard for option in planner._best_plan or () for shard in _shards(option, query)]
    return Placement(
        world_size=query.world_size,
        device_memory=query.device_memory,
        reserved=query.reserved,
        shards=tuple(sorted(shards, key=lambda shard: (shard.rank, shard.table))),
    )


def _reason(query: PlacementRequest) -> str:
    free = query.device_memory - query.reserved
    return (
        f"the tables, their {query.optimizer} state and buffers do not fit on {query.world_size} "
        f"x {free:,} bytes of {query.device} memory ({', '.join(query.sharding)})"
    )


def _topology(query: PlacementRequest) -> Topology:
    memory = query.device_memory - query.reserved
    on_cpu = query.device == "cpu"
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=query.world_size,
            local_world_size=query.world_size,
            ddr_cap_bytes=memory if on_cpu else 0,
            hbm_cap_bytes=0 if on_cpu else memory,
        ),
        kernel_config=KernelConfig(compute_device=query.device),
    )


def _constraints(tables: nn.Module, query: PlacementRequest) -> dict[str, ParameterConstraints]:
    found = {}
    for path, module in tables.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            # Row-wise wants equal batches on all ranks, and single values do not come in such.
            unpooled = path.endswith("unpooled_rows")
            for config in module.embedding_bag_configs():
                keys = config.feature_names
                found[config.name] = ParameterConstraints(
                    sharding_types=["table_wise"]
                    if unpooled
                    else _allowed(config.num_embeddings, query.sharding, query),
                    pooling_factors=[query.pooling_factors.get(key, 1.0) for key in keys],
                )
    return found


def _allowed(num_embeddings: int, sharding: Sequence[str], query: PlacementRequest) -> list[str]:
    """The sharding types that training would use for a table, too."""
    if splits_by_rows(num_embeddings, query.world_size):
        return list(sharding)
    return [kind for kind in sharding if kind != "row_wise"] or ["table_wise"]


def _shards(option: ShardingOption, query: PlacementRequest) -> Iterator[Shard]:
    item = option.tensor.element_size()
    state = _state_words(query.optimizer)
    for shard in option.shards:
        rows, columns = shard.size
        weights = rows * columns * item
        # The planner counts state in the weights' type.
        optimizer = item * state(rows, columns)
        storage = shard.storage.ddr if query.device == "cpu" else shard.storage.hbm
        yield Shard(
            table=option.name,
            rank=shard.rank,
            sharding=option.sharding_type,
            rows=rows,
            columns=columns,
            weight_bytes=weights,
            optimizer_bytes=optimizer,
            buffer_bytes=storage - weights - optimizer,
        )


def _state_words(optimizer: RowOptimizer) -> Callable[[int, int], int]:
    words: dict[RowOptimizer, Callable[[int, int], int]] = {
        "sgd": lambda rows, columns: 0,
        "rowwise_adagrad": lambda rows, columns: rows,
        "adagrad": lambda rows, columns: rows * columns,
        "adam": lambda rows, columns: 2 * rows * columns,
    }
    return words[optimizer]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the planner's log lines about tables that have no sharding spec."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
