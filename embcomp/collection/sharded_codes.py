"""Codes, bitmaps and pointers of a model dealt out to ranks, as TorchRec deals out rows."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from embcomp.errors import ConfigError
from embcomp.layers.shardable_buffers import shardable
from embcomp.tables.budget import SHARD_CODES_ABOVE, parse_budget


def shard_codes(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    *,
    above: str | int = SHARD_CODES_ABOVE,
) -> list[str]:
    """Keep on each rank a chunk of what is learnt of every id of a large table, in place of all of it.

    Every rank calls it, before DistributedModelParallel where memory matters, and from then on all of them
    take part in each look-up, as TorchRec's sharded collections want anyway. What is on `meta` is never
    whole anywhere. State dicts hold a ShardedTensor under the name of the whole, which
    torch.distributed.checkpoint deals out to any number of ranks.

    Args:
        model: holds collections of embcomp, not sharded.
        group: the ranks that share; all by default. A group of one changes nothing.
        above: bytes up to which a table's codes, bitmaps and pointers stay on every rank.

    Returns:
        The tables whose codes are sharded.

    Raises:
        ConfigError: without a process group of which this is a rank, or for codes that are sharded already.
    """
    if group is None:
        group = dist.group.WORLD if dist.is_initialized() else None
    if group is None or dist.get_rank(group) < 0:
        raise ConfigError(
            "codes are sharded over the ranks of a process group, of which this process is none; call "
            "torch.distributed.init_process_group first, or leave them whole"
        )
    least = check_shard_codes_above(above, "above")
    return [table for buffers in shardable(model) for table in buffers.shard(group, least)]


def check_shard_codes_above(above: str | int, name: str) -> int:
    """The bytes up to which a table's codes, bitmaps and pointers stay on every rank.

    Args:
        above: as it was given.
        name: what the setting is called.

    Raises:
        ConfigError: it is no number of bytes.
    """
    least = parse_budget(above, name=name)
    if least < 1:
        raise ConfigError(f"{name}: expected a number of bytes such as '64MiB'; got {above!r}")
    return least
