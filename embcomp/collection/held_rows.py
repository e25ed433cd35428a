"""How the rows of look-ups in bags of one are held: what the bags of a batch must look like.

A collection that TorchRec has sharded by rows wants equally many bags of every rank. No other does,
so no other waits for ranks: one of them may look something up on its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingEnv2D, ShardingType

_SPLIT_BY_ROWS = {
    ShardingType.ROW_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.GRID_SHARD.value,
}


@dataclass(frozen=True)
class HeldRows:
    """What holds the rows.

    Args:
        equal_among: the ranks that need equally many bags of each other; None when this rank's are
            its own affair.
    """

    equal_among: dist.ProcessGroup | None = None

    @classmethod
    def by(cls, inner: nn.Module | None) -> HeldRows:
        """How an inner collection holds rows, sharded or not."""
        if not isinstance(inner, ShardedEmbeddingBagCollection):
            return cls()
        kinds = {each.sharding_type for each in inner.module_sharding_plan.values()}
        if kinds.isdisjoint(_SPLIT_BY_ROWS):
            return cls()
        env = inner._env
        return cls(env.sharding_pg if isinstance(env, ShardingEnv2D) else env.process_group)

    def common_stride(self, stride: int, device: torch.device) -> int:
        """The number of bags that a look-up needs for each key.

        Args:
            stride: how many this rank has.
            device: where the batch is.
        """
        group = self.equal_among
        if group is None or dist.get_world_size(group) == 1:
            return stride
        on = device if dist.get_backend(group) == "nccl" else torch.device("cpu")
        largest = torch.tensor(stride, device=on)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        return int(largest.item())
