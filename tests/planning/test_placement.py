"""TorchRec's planner as an oracle: bytes per rank without devices, and what would be enough."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torchrec import EmbeddingBagConfig

from embcomp.backends import QR, Full, Hash, Unified
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.planning.placement import (
    PlacementError,
    PlacementRequest,
    place,
    row_wise_bytes,
    smallest_memory,
    smallest_world,
)
from embcomp.tables.footprint import RowOptimizer

GIB = 1 << 30


def on_meta(plan, rows=(10**6, 10**5, 40), dim=16):
    tables = [
        EmbeddingBagConfig(
            name=f"t{i}", num_embeddings=n, embedding_dim=dim, feature_names=[f"f{i}"]
        )
        for i, n in enumerate(rows)
    ]
    return CompressedEmbeddingBagCollection(tables, plan, device=torch.device("meta"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("optimizer", get_args(RowOptimizer))
def test_bytes_over_all_ranks_are_the_footprint(device, optimizer: RowOptimizer):
    tables = on_meta(Full())
    query = PlacementRequest(world_size=2, device_memory=GIB, device=device, optimizer=optimizer)
    placement = place(tables, query)
    weights = sum(shard.weight_bytes for shard in placement.shards)
    state = sum(shard.optimizer_bytes for shard in placement.shards)
    assert weights == tables.footprint.train_weight_bytes
    assert weights + state == tables.footprint.train_bytes(optimizer)
    assert all(shard.buffer_bytes >= 0 for shard in placement.shards)
    assert max(placement.bytes_per_rank()) <= GIB
    without = place(on_meta(Full()), replace(query, optimizer="sgd"))
    assert sum(placement.bytes_per_rank()) - sum(without.bytes_per_rank()) == state


@pytest.mark.parametrize("plan", [Hash(ratio=0.1), QR(divisor=8), Unified(num_buckets=5000)])
def test_every_method_is_placed(plan):
    tables = on_meta(plan)
    placement = place(tables, PlacementRequest(world_size=4, device_memory=GIB))
    rows = {table.name: 0 for table in tables.physical_tables}
    for shard in placement.shards:
        rows[shard.table] += shard.rows
    assert rows == {table.name: table.num_embeddings for table in tables.physical_tables}


def test_a_table_larger_than_a_device_is_split_by_rows():
    tables = on_meta(Full(), rows=(10**8,))
    placement = place(tables, PlacementRequest(world_size=4, device_memory=2 * GIB))
    assert {shard.sharding for shard in placement.shards} == {"row_wise"}
    assert {shard.rank for shard in placement.shards} == {0, 1, 2, 3}


@pytest.mark.parametrize("sharding", [("row_wise",), ("table_wise", "row_wise")])
def test_a_table_without_rows_for_every_rank_stays_whole(sharding):
    # Of 9 rows, split in twos, the last three of eight ranks would get none.
    tables = on_meta(Full(), rows=(10**6, 9, 3))
    memory = 10 << 20  # the large table fits no single device
    placement = place(
        tables, PlacementRequest(world_size=8, device_memory=memory, sharding=sharding)
    )
    found = {shard.table: [] for shard in placement.shards}
    for shard in placement.shards:
        found[shard.table].append((shard.sharding, shard.rows))
    assert found["t0"] == [("row_wise", 125_000)] * 8
    assert found["t1"] == [("table_wise", 9)] and found["t2"] == [("table_wise", 3)]


def test_bytes_of_a_table_that_stays_whole_count_on_every_rank():
    query = PlacementRequest(world_size=8, device_memory=GIB, device="cpu")
    whole, split = row_wise_bytes([(9, 16, 4, (1.0,)), (80_000, 16, 4, (1.0,))], query)
    assert whole == (whole[0],) * 8 and whole[0] >= 9 * (16 + 1) * 4
    assert len(split) == 8 and sum(split) >= 80_000 * (16 + 1) * 4


def test_too_much_for_the_devices_is_an_error_that_names_them():
    with pytest.raises(PlacementError, match="do not fit on 2 x 1,048,576 bytes of cuda memory"):
        place(on_meta(Full()), PlacementRequest(world_size=2, device_memory=1 << 20))


def test_reserved_memory_is_not_used():
    tables, query = on_meta(Full()), PlacementRequest(world_size=1, device_memory=100 << 20)
    assert place(tables, query)
    with pytest.raises(PlacementError):
        place(on_meta(Full()), replace(query, reserved=50 << 20))
    with pytest.raises(PlacementError, match="leave nothing"):
        replace(query, reserved=100 << 20)


def test_the_suggested_memory_is_enough_and_not_much_more_than_needed():
    tables, query = on_meta(Full()), PlacementRequest(world_size=1, device_memory=1 << 20)
    with pytest.raises(PlacementError):
        place(tables, query)
    needed = tables.footprint.train_bytes("rowwise_adagrad")
    found = smallest_memory(tables, query, 2 * needed)
    assert found is not None and needed <= found <= 1.05 * needed
    assert place(on_meta(Full()), replace(query, device_memory=found))


def test_the_suggested_number_of_ranks_is_enough():
    tables, query = (
        on_meta(Full(), rows=(10**7,)),
        PlacementRequest(world_size=1, device_memory=300 << 20),
    )
    with pytest.raises(PlacementError):
        place(tables, query)
    found = smallest_world(tables, query)
    assert found == 4
    assert smallest_world(tables, query, most=2) is None


def test_nonsense_devices_are_refused():
    with pytest.raises(PlacementError, match="world_size: expected a positive number, got 0"):
        PlacementRequest(world_size=0, device_memory=GIB)


def test_a_billion_rows_are_placed_quickly_and_without_allocation():
    start = time.perf_counter()
    place(
        on_meta(Full(), rows=(4 * 10**8,) * 2 + (2 * 10**8,)),
        PlacementRequest(world_size=8, device_memory=40 * GIB),
    )
    assert time.perf_counter() - start < 5
