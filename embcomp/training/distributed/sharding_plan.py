"""Which rank holds which rows: the sharding plan of every TorchRec collection inside a model.

A fused optimizer does not exist for data-parallel tables, and TorchRec's planner likes to make
small tables data-parallel: they would then be trained by another optimizer, on some numbers of ranks
and not on others. So a table is data-parallel only where the config says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    PlannerError,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan

from embcomp.errors import ConfigError
from embcomp.tables.specs import splits_by_rows
from embcomp.training.distributed.process import Process

Sharding = Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"]


class RowSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder; it also offers the planner row-wise plans on CPU, where the kernels work."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]


def make_sharder(max_gradient: float | None) -> RowSharder:
    """The sharder of row collections.

    Args:
        max_gradient: Bound on each element of a row's gradient; the fused kernels apply it.
    """
    clipping = {"gradient_clipping": True, "max_gradient": max_gradient}
    return RowSharder(fused_params=None if max_gradient is None else clipping)


def row_collections(model: nn.Module) -> Iterator[tuple[str, EmbeddingBagCollection]]:
    """Every TorchRec collection inside an unsharded model, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            yield path, module


def plan_sharding(
    model: nn.Module,
    sharder: RowSharder,
    process: Process,
    sharding: Sharding,
    batch_size: int,
) -> ShardingPlan:
    """Places the rows of a model.

    Args:
        model: The unsharded model, row optimizers attached.
        sharder: From `make_sharder`.
        process: The process group.
        sharding: What the config asks for; `auto` is TorchRec's planner, which balances the ranks.
        batch_size: Rows per step and rank, for the planner's estimates.
    """
    if sharding == "auto" and process.world_size > 1:
        return _ask_planner(model, sharder, process, batch_size)
    plan, loads = {}, [0] * process.world_size
    for path, collection in row_collections(model):
        generators = {
            table: _place(weight, sharding, _is_unpooled(path), loads)
            for table, weight in sharder.shardable_parameters(collection).items()
        }
        plan[path] = construct_module_sharding_plan(
            collection,
            generators,
            sharder=sharder,
            local_size=process.world_size,
            world_size=process.world_size,
            device_type=process.device.type,
        )
    return ShardingPlan(plan)


def _place(
    weight: nn.Parameter, sharding: Sharding, unpooled: bool, loads: list[int]
) -> ParameterShardingGenerator:
    if sharding == "data_parallel":
        return data_parallel()
    if sharding == "row_wise" and not unpooled and splits_by_rows(len(weight), len(loads)):
        return row_wise()
    if sharding == "column_wise":
        # Fused kernels want pieces of a multiple of 4 columns, all of one width.
        width = weight.shape[1]
        pieces = max(n for n in range(1, len(loads) + 1) if n == 1 or width % (4 * n) == 0)
        return column_wise(
            ranks=[_least_loaded(loads, weight.numel() // pieces) for _ in range(pieces)]
        )
    return table_wise(rank=_least_loaded(loads, weight.numel()))


def _least_loaded(loads: list[int], size: int) -> int:
    rank = loads.index(min(loads))
    loads[rank] += max(size, 1)
    return rank


def _is_unpooled(path: str) -> bool:
    # Each rank has its own number of single values there, and row-wise needs equal batches.
    return path.endswith("unpooled_rows")


def _ask_planner(
    model: nn.Module, sharder: RowSharder, process: Process, batch_size: int
) -> ShardingPlan:
    table_only = {
        table
        for path, collection in row_collections(model)
        for table, weight in sharder.shardable_parameters(collection).items()
        if _is_unpooled(path) or not splits_by_rows(len(weight), process.world_size)
    }
    both = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]
    constraints = {
        table: ParameterConstraints(
            sharding_types=both[:1] if table in table_only else both,
            compute_kernels=[EmbeddingComputeKernel.FUSED.value],
        )
        for _, collection in row_collections(model)
        for table in sharder.shardable_parameters(collection)
    }
    planner = EmbeddingShardingPlanner(
        topology=_topology(process),
        batch_size=batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.1),
        stats=[],
    )
    group = dist.GroupMember.WORLD
    assert group is not None
    try:
        return planner.collective_plan(model, [sharder], group)
    except PlannerError as error:
        raise ConfigError(
            f"the tables do not fit on {process.world_size} {process.device.type} device(s): "
            "lower tables.budget, choose a smaller method or start more ranks"
        ) from error


def _topology(process: Process) -> Topology:
    """The devices and their memory as they are; TorchRec would assume some of its own."""
    on_cpu = process.device.type == "cpu"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", process.world_size))
    memory = psutil.virtual_memory().total // local
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=process.world_size,
            local_world_size=local,
            ddr_cap_bytes=memory,
            hbm_cap_bytes=0
            if on_cpu
            else torch.cuda.get_device_properties(process.device).total_memory,
        ),
        kernel_config=KernelConfig(compute_device=process.device.type),
    )
