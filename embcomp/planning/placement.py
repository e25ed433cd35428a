"""Where TorchRec's planner would put the tables, asked without devices, ranks or allocation.

The planner sees modules on `meta` and a topology that is only described, so a billion rows cost
no more than ten. What it does not see is subtracted first: pass it as `reserved`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.distributed.optim import (  # type: ignore[attr-defined]
    _apply_optimizer_in_backward,
)
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.types import ShardingOption
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad

from embcomp.layers.row_rmsprop import STATE_WORDS, RowWiseRmspropAr
from embcomp.planning.enumerator import SharingEnumerator
from embcomp.planning.planner import (
    SHARDING,
    BesideRows,
    Device,
    PlacementError,
    PlacementRequest,
    RowSharder,
    allowed_sharding,
    beside_rows,
    find_plan,
    quiet,
    row_collections,
    topology_of,
)
from embcomp.tables.budget import largest_int
from embcomp.tables.footprint import RowOptimizer

__all__ = [
    "SHARDING",
    "Device",
    "Placement",
    "PlacementError",
    "PlacementRequest",
    "Shard",
    "TableShape",
    "Tables",
    "attach_optimizer",
    "place",
    "place_stages",
    "row_wise_bytes",
    "smallest_memory",
    "smallest_world",
]

Tables = nn.Module | Sequence[nn.Module]
"""Modules on `meta` that hold collections; several stand for the stages of one training."""

TableShape = tuple[int, int, int, tuple[float, ...]]
"""All of a table that the planner's bytes depend on: rows, width, bytes of a weight, bag lengths."""

_OPTIMIZERS: dict[RowOptimizer, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "rowwise_adagrad": RowWiseAdagrad,
    "rowwise_rmsprop_ar": RowWiseRmspropAr,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
}


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
        beside_rows: what each rank holds beside the rows: codes, bitmaps, pointers.
    """

    world_size: int
    device_memory: int
    reserved: int
    shards: tuple[Shard, ...]
    beside_rows: BesideRows = field(default_factory=BesideRows)

    @property
    def beside(self) -> int:
        """Bytes on each rank that belong to no rows."""
        return self.beside_rows.on_each

    def on_rank(self, rank: int) -> list[Shard]:
        """The parts on one rank."""
        return [shard for shard in self.shards if shard.rank == rank]

    def equal_ranks(self) -> list[tuple[int, int]]:
        """First and last rank of every run of ranks that hold equally much in equal ways."""
        runs: list[tuple[int, int]] = []
        before: object = None
        for rank in range(self.world_size):
            held = sorted(
                (s.sharding, s.weight_bytes, s.optimizer_bytes, s.buffer_bytes)
                for s in self.on_rank(rank)
            )
            if held == before:
                runs[-1] = (runs[-1][0], rank)
            else:
                runs.append((rank, rank))
            before = held
        return runs

    def bytes_per_rank(self) -> list[int]:
        """Bytes on each rank, the reserved ones left out."""
        totals = [self.beside] * self.world_size
        for shard in self.shards:
            totals[shard.rank] += shard.bytes
        return totals


def attach_optimizer(tables: nn.Module, optimizer: RowOptimizer) -> None:
    """Make the planner count an optimizer's state on every row of a `meta` module."""
    for _, collection in row_collections(tables):
        _apply_optimizer_in_backward(_OPTIMIZERS[optimizer], collection.parameters(), {"lr": 0.1})


def place(tables: Tables, query: PlacementRequest) -> Placement:
    """Ask TorchRec's planner for a placement.

    Args:
        tables: each asked once, as the optimizer is attached to them.
        query: devices and memory.

    Returns:
        The placement; of several stages, that which fills a device most.

    Raises:
        PlacementError: when the tables cannot be placed; the text says why.
    """
    for stage in _stages(tables):
        attach_optimizer(stage, query.optimizer)
    return _ask(tables, query)


def place_stages(tables: Sequence[nn.Module], query: PlacementRequest) -> list[Placement]:
    """Ask for a placement of every stage of one training, as `place` does.

    Raises:
        PlacementError: when the tables of a stage cannot be placed; the text says of which.
    """
    placements = []
    for number, stage in enumerate(tables, 1):
        attach_optimizer(stage, query.optimizer)
        try:
            placements.append(_placement(stage, query))
        except PlacementError as error:
            if len(tables) == 1:
                raise
            raise PlacementError(f"stage {number} of {len(tables)}: {error}") from None
    return placements


def smallest_memory(tables: Tables, query: PlacementRequest, most: int) -> int | None:
    """The least memory per device, to about 2 %, for which a placement exists; None if none is.

    Args:
        tables: as for `place`, the optimizer attached already.
        query: devices; its memory is replaced, and a reserve that is a share of it.
        most: bytes per device beyond which not to look.
    """
    steps = 64
    found = largest_int(lambda down: _fits(tables, query, most * (steps - down) // steps), 0, 63)
    return None if found is None else most * (steps - found) // steps


def smallest_world(tables: Tables, query: PlacementRequest, most: int = 1024) -> int | None:
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
            sharding_types=allowed_sharding(rows, ["row_wise"], query.world_size),
            pooling_factors=list(lengths),
        )
        for i, (rows, _, _, lengths) in enumerate(tables)
    }
    with quiet():
        options = SharingEnumerator(
            topology=topology_of(query), batch_size=query.batch_size, constraints=constraints
        ).enumerate(module, [RowSharder()])
    by_name = {option.name: option for option in options}
    found = []
    for config in configs:
        storages = [shard.storage for shard in by_name[config.name].shards]
        sizes = [each.ddr if query.device == "cpu" else each.hbm for each in storages]
        found.append(tuple(sizes * query.world_size if len(sizes) == 1 else sizes))
    return found


def _stages(tables: Tables) -> Sequence[nn.Module]:
    return [tables] if isinstance(tables, nn.Module) else tables


def _fits(tables: Tables, query: PlacementRequest, memory: int) -> bool:
    try:
        _ask(tables, query.with_memory(memory))
    except PlacementError:
        return False
    return True


def _ask(tables: Tables, query: PlacementRequest) -> Placement:
    placements = [_placement(stage, query) for stage in _stages(tables)]
    return max(placements, key=lambda placement: max(placement.bytes_per_rank(), default=0))


def _placement(tables: nn.Module, query: PlacementRequest) -> Placement:
    options = find_plan(tables, query).options
    shards = [shard for option in options for shard in _shards(option, query)]
    return Placement(
        world_size=query.world_size,
        device_memory=query.device_memory,
        reserved=query.reserved,
        shards=tuple(sorted(shards, key=lambda shard: (shard.rank, shard.table))),
        beside_rows=beside_rows(tables, query),
    )


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
        "rowwise_rmsprop_ar": lambda rows, columns: STATE_WORDS * rows,
        "adagrad": lambda rows, columns: rows * columns,
        "adam": lambda rows, columns: 2 * rows * columns,
    }
    return words[optimizer]
