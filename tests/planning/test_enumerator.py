"""The quick enumerator finds the options, bytes and times that TorchRec's own does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator

from embcomp.planning.enumerator import SharingEnumerator, SharingShard
from embcomp.planning.placement import attach_optimizer
from embcomp.planning.planner import PlacementRequest, RowSharder, quiet, topology_of

ROWS = (1_000_003, 4096, 70)
KINDS = ["table_wise", "row_wise", "column_wise", "table_row_wise"]


def options_of(kind, world_size, device):
    tables = [
        EmbeddingBagConfig(
            name=f"t{n}", num_embeddings=rows, embedding_dim=32, feature_names=[f"f{n}", f"g{n}"]
        )
        for n, rows in enumerate(ROWS)
    ]
    rows = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    module = nn.ModuleDict({"rows": rows})
    attach_optimizer(module, "rowwise_adagrad")
    query = PlacementRequest(
        world_size=world_size, local_world_size=2, device_memory=1 << 30, device=device
    )
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=KINDS, min_partition=8, pooling_factors=[1.0, 2.5]
        )
        for table in tables
    }
    found = kind(topology=topology_of(query), batch_size=512, constraints=constraints)
    with quiet():
        return found.enumerate(module, [RowSharder()])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("world_size", [2, 6])
def test_options_are_those_of_torchrec(world_size, device):
    def seen(options):
        return sorted(
            (
                option.name,
                option.sharding_type,
                [(s.size, s.offset, s.storage, s.perf) for s in option.shards],
            )
            for option in options
        )

    own, theirs = (
        options_of(kind, world_size, device) for kind in (SharingEnumerator, EmbeddingEnumerator)
    )
    assert len(own) == len(ROWS) * len(KINDS)
    assert seen(own) == seen(theirs)
    kinds = [option.sharding_type for option in own]
    assert kinds == sorted(KINDS) * len(ROWS)


def test_copies_of_shards_have_ranks_of_their_own():
    shard = options_of(SharingEnumerator, 2, "cpu")[0].shards[0]
    assert isinstance(shard, SharingShard)
    other = copy.deepcopy(shard)
    assert other == shard and hash(other) == hash(shard)
    other.rank = 1
    assert shard.rank is None and other != shard and hash(other) != hash(shard)
    assert other.storage is shard.storage
