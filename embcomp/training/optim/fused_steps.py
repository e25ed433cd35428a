"""The number of the step, as fused kernels know it: told, not counted by them nor read from checkpoints.

A kernel counts the look-ups of its tables, evaluations included, and Adam's and RMSprop's updates go by that
number: how often a run is evaluated would change what it learns. RMSprop's kernel also shows its count as a state
of every table, of one number a shard, which no other number of ranks could read; and where one row of a table is all
that a rank has, TorchRec takes the row's state for such a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torchrec.optim.keyed import KeyedOptimizer
from typing_extensions import override

_COUNT, _FIRST, _LAST_UPDATE = "iter", "momentum1", "prev_iter"


def tell_step(kernels: Sequence[SplitTableBatchedEmbeddingBagsCodegen], done: int) -> None:
    """Make the next look-up that of a step.

    Args:
        kernels: of the model's rows.
        done: steps before it.
    """
    for kernel in kernels:
        count = kernel.iter
        assert isinstance(count, Tensor)
        count.fill_(done)
        kernel.iter_cpu.fill_(done)


class RowStates(KeyedOptimizer):
    """A fused optimizer whose states are those of rows alone, every one sharded as its rows are.

    Args:
        fused: TorchRec's.
    """

    def __init__(self, fused: KeyedOptimizer) -> None:
        state = {weight: _of_rows(own) for weight, own in fused.state.items()}
        super().__init__(fused.params, state, fused.param_groups)
        self._fused = fused

    @override
    def zero_grad(self, set_to_none: bool = False) -> None:
        self._fused.zero_grad(set_to_none)

    @override
    def step(self, closure: Any = None) -> None:
        self._fused.step(closure)


def _of_rows(states: Mapping[str, Any]) -> dict[str, Any]:
    """A table's states by name, `<table>.<state>`."""
    found = {name: value for name, value in states.items() if name.rpartition(".")[2] != _COUNT}
    for name, value in found.items():
        table, _, kind = name.rpartition(".")
        if kind == _LAST_UPDATE:
            found[name] = _sharded_as(states[f"{table}.{_FIRST}"], value)
    return found


def _sharded_as(like: ShardedTensor, value: ShardedTensor) -> ShardedTensor:
    """The tensors of one state under the places of another of equal shape."""
    shards = [
        Shard(own.tensor, place.metadata)
        for own, place in zip(value.local_shards(), like.local_shards(), strict=True)
    ]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local_shards=shards,
        sharded_tensor_metadata=like.metadata(),
        process_group=like._process_group,
    )
