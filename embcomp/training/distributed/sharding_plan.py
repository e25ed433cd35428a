"""Which rank holds which rows: the sharding plan of every TorchRec collection inside a model.

A fused optimizer does not exist for data-parallel tables, and TorchRec's planner likes to make
small tables data-parallel: they would then be trained by another optimizer, on some numbers of ranks
and not on others. So a table is data-parallel only where the config says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from torch import nn
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
from embcomp.planning.planner import (
    PlacementError,
    PlacementRequest,
    RowSharder,
    column_pieces,
    find_plan,
    pooling_factors,
    row_collections,
)
from embcomp.tables.budget import RESERVE, SHARD_CODES_ABOVE, parse_budget, reserved_bytes
from embcomp.tables.footprint import RowOptimizer
from embcomp.tables.specs import splits_by_rows
from embcomp.training.distributed.process import Process

Sharding = Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"]


def make_sharder(max_gradient: float | None) -> RowSharder:
    """The sharder of row collections.

    Args:
        max_gradient: bound on each element of a row's gradient; the fused kernels apply it.
    """
    clipping = {"gradient_clipping": True, "max_gradient": max_gradient}
    return RowSharder(fused_params=None if max_gradient is None else clipping)


def plan_sharding(
    model: nn.Module,
    sharder: RowSharder,
    process: Process,
    sharding: Sharding,
    batch_size: int,
    row_optimizer: RowOptimizer,
    mean_lengths: Mapping[str, float],
    shard_codes_above: str | int = SHARD_CODES_ABOVE,
) -> ShardingPlan:
    """Place the rows of a model.

    Args:
        model: the unsharded model, row optimizers attached.
        sharder: from `make_sharder`.
        process: the process group.
        sharding: what the config asks for; `auto` is TorchRec's planner, which balances the ranks.
        batch_size: rows per step and rank, for the planner's estimates.
        row_optimizer: what updates rows, for messages.
        mean_lengths: mean number of values of each feature, for the planner's estimates.
        shard_codes_above: bytes up to which codes of a table will be on every rank.
    """
    if sharding == "auto" and process.world_size > 1:
        memory = device_memory(process)
        query = PlacementRequest(
            world_size=process.world_size,
            device_memory=memory,
            device="cuda" if process.device.type == "cuda" else "cpu",
            optimizer=row_optimizer,
            batch_size=batch_size,
            reserved=reserved_bytes(RESERVE, memory),
            pooling_factors=pooling_factors(model, mean_lengths),
            local_world_size=_local_world_size(process),
            shard_codes_above=parse_budget(shard_codes_above),
        )
        return _ask_planner(model, sharder, process, query)
    plan, loads = {}, [0] * process.world_size
    for path, collection in row_collections(model):
        generators = {
            table: _place(weight, sharding, loads)
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
    weight: nn.Parameter, sharding: Sharding, loads: list[int]
) -> ParameterShardingGenerator:
    if sharding == "data_parallel":
        return data_parallel()
    if sharding == "row_wise" and splits_by_rows(len(weight), len(loads)):
        return row_wise()
    if sharding == "column_wise":
        pieces = column_pieces(weight.shape[1], len(loads))
        return column_wise(
            ranks=[_least_loaded(loads, weight.numel() // pieces) for _ in range(pieces)]
        )
    return table_wise(rank=_least_loaded(loads, weight.numel()))


def _least_loaded(loads: list[int], size: int) -> int:
    rank = loads.index(min(loads))
    loads[rank] += max(size, 1)
    return rank


def _ask_planner(
    model: nn.Module,
    sharder: RowSharder,
    process: Process,
    query: PlacementRequest,
) -> ShardingPlan:
    """TorchRec's planner on the first rank, for all of them; what it refuses, all refuse."""
    answer: list[ShardingPlan | str | None] = [None]
    if process.is_main:
        try:
            answer = [find_plan(model, query, sharder).plan]
        except PlacementError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0)
    (plan,) = answer
    if isinstance(plan, ShardingPlan):
        return plan
    raise ConfigError(
        f"{plan}: lower tables.budget, choose a smaller method or start more ranks; `embcomp plan` "
        "with --world-size and --device-memory says what would fit"
    )


def device_memory(process: Process) -> int:
    """Bytes of one rank's device; ranks on one host share its memory."""
    if process.device.type == "cuda":
        return int(torch.cuda.get_device_properties(process.device).total_memory)
    return int(psutil.virtual_memory().total) // _local_world_size(process)


def _local_world_size(process: Process) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", process.world_size))
