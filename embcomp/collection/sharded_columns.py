"""Sharded rows of another width, shard by shard."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.nn.functional import pad


def with_columns(rows: ShardedTensor, columns: int) -> ShardedTensor:
    """A copy of rows with so many columns: zeros added at the end, or only the first ones.

    Nothing is sent between ranks. Sharded tensors must be contiguous, or this could be a view. The shards at the right edge change, which no width of a table and
    its padding can leave without a column.

    Args:
        rows: (rows, other columns), sharded in any way.
        columns: wanted.
    """
    was = rows.metadata()
    edge = was.size[1]

    def resized(shard: ShardMetadata) -> ShardMetadata:
        row, column = shard.shard_offsets
        if column + shard.shard_sizes[1] != edge:
            return shard
        return ShardMetadata(
            [row, column], [shard.shard_sizes[0], columns - column], shard.placement
        )

    metadata = ShardedTensorMetadata(
        shards_metadata=[resized(shard) for shard in was.shards_metadata],
        size=was.size[:1] + (columns,),
        tensor_properties=replace(was.tensor_properties),
    )
    shards = []
    for shard in rows.local_shards():
        new = resized(shard.metadata)
        shards.append(Shard(_with_columns(shard.tensor, new.shard_sizes[1]), new))
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, metadata, process_group=rows._process_group
    )


def _with_columns(rows: Tensor, columns: int) -> Tensor:
    rows = rows.detach()
    missing = columns - rows.shape[1]
    return pad(rows, (0, missing)) if missing > 0 else rows[:, :columns].contiguous()
