"""How the rows of look-ups in bags of one are held: what the bags of a batch must look like.

A collection that TorchRec has sharded by rows wants equally many bags of every rank. No other does,
so no other waits for ranks: one of them may look something up on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingEnv2D, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

_SPLIT_BY_ROWS = {
    ShardingType.ROW_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.GRID_SHARD.value,
}


@dataclass(frozen=True, kw_only=True)
class HeldRows:
    """What holds the rows.

    Args:
        takes_keys_of_any_length: whether the rows can be read key by key, so that keys need not be
            padded to one length.
        reads_negative_ids: whether zeros are read for a negative id, so that none need be taken out.
        equal_among: the ranks that need equally many bags of each other; None when this rank's are
            its own affair.
    """

    takes_keys_of_any_length: bool = False
    reads_negative_ids: bool = False
    equal_among: dist.ProcessGroup | None = None

    @classmethod
    def by(cls, inner: nn.Module | None) -> HeldRows:
        """How an inner collection holds rows, sharded or not."""
        if not isinstance(inner, ShardedEmbeddingBagCollection):
            return cls(takes_keys_of_any_length=type(inner) is EmbeddingBagCollection)
        kinds = {each.sharding_type for each in inner.module_sharding_plan.values()}
        if kinds.isdisjoint(_SPLIT_BY_ROWS):
            return cls()
        env = inner._env
        group = env.sharding_pg if isinstance(env, ShardingEnv2D) else env.process_group
        return cls(equal_among=group)

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


@dataclass
class RowsHolder:
    """What a collection tells its route, also once a train pipeline has wrapped the route.

    Args:
        held: how the rows are held by now.
        by_key: whether the next look-up may have keys of different lengths. Whoever calls the route
            without saying so, as a traced graph does, gets keys padded to one length.
        rows: what holds them, for routes that write to rows: of look-ups in bags of one.
        equal_bags: whether ranks need equally many bags of each other in look-ups that are pooled.
    """

    held: HeldRows = field(default_factory=HeldRows)
    by_key: bool = False
    rows: nn.Module | None = None
    equal_bags: bool = False

    def tell(
        self, held: HeldRows, rows: nn.Module | None, *, equal_bags: bool, traced: bool
    ) -> None:
        """Say how rows are held in the look-up that follows.

        Args:
            held: how.
            rows: what holds them.
            equal_bags: whether pooled look-ups need equally many bags on all ranks.
            traced: whether a tracer records it, as one call of the inner collection for any batch.
        """
        if held != self.held:
            self.held = held
        self.rows = rows
        self.equal_bags = equal_bags
        # A compiled graph may not know whether keys differ in length.
        compiling = torch.compiler.is_compiling()
        self.by_key = held.takes_keys_of_any_length and not traced and not compiling

    def take_by_key(self) -> bool:
        """Whether the look-up that begins may have keys of different lengths; it alone."""
        by_key, self.by_key = self.by_key, False
        return by_key
