"""The optimizer that a table's rows were given, for methods that write rows themselves.

A fused optimizer lives in FBGEMM's kernels, beside the shards of this rank; that of a collection which is
not sharded was attached by `apply_optimizer_in_backward`. Either says how fast rows learn, and keeps the
state that is in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType
from torchrec.optim import RowWiseAdagrad

from embcomp.errors import ConfigError

RowRule = Literal["sgd", "rowwise_adagrad"]

_FUSED: dict[EmbOptimType, RowRule] = {
    EmbOptimType.EXACT_SGD: "sgd",
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: "rowwise_adagrad",
}
_WHOLE_ROWS = {
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
}
_WAY_OUT = "take sgd or rowwise_adagrad, which keep at most one number for a row"


@dataclass(frozen=True, kw_only=True)
class OptimizedRows:
    """Rows of a table on this rank, and what its optimizer keeps of them.

    Attributes:
        weight: (rows here, columns), to be written in place.
        first_row: which row of the table the first is.
        rule: how they learn.
        rate: asks for the learning rate as it is now.
        eps: what is added to the root of sums.
        sums: (rows here,) sums of squared gradients' means; None for `sgd`.
        most: to which elements of gradients are cut, where they are.
    """

    weight: Tensor
    first_row: int
    rule: RowRule
    rate: Callable[[], float]
    eps: float
    sums: Tensor | None
    most: float | None = None

    def cut(self, gradients: Tensor) -> Tensor:
        """Gradients, none of whose elements is too large."""
        return gradients if self.most is None else gradients.clamp(-self.most, self.most)

    def rates_of(self, rows: Tensor, gradients: Tensor, rate: float) -> Tensor:
        """Learning rates of single rows, once their state knows these gradients.

        Args:
            rows: (N,) int64 places in `weight`, each once.
            gradients: (N, D) float32.
            rate: the learning rate of the step.

        Returns:
            (N, 1) float32.
        """
        if self.sums is None:
            return gradients.new_full((len(rows), 1), rate)
        self.sums[rows] += gradients.pow(2).mean(dim=1)
        return rate / (self.sums[rows].sqrt() + self.eps).unsqueeze(1)


def optimized_rows(holder: nn.Module, table: str, method: str) -> list[OptimizedRows]:
    """The rows of a physical table on this rank; none where others hold it.

    Args:
        holder: TorchRec's collection, sharded or not.
        table: the physical table.
        method: who wants to write, for errors.

    Raises:
        ConfigError: for rows that nobody may write, or an optimizer that this does not know.
    """
    if isinstance(holder, ShardedEmbeddingBagCollection):
        placed = holder.module_sharding_plan[table]
        if placed.sharding_type not in _WHOLE_ROWS or placed.compute_kernel != "fused":
            raise ConfigError(
                f"{method}: rows of table {table!r} are {placed.sharding_type} with the kernel "
                f"{placed.compute_kernel}; it writes whole rows in a device's own memory beside a fused optimizer. "
                "Shard the table table-wise or row-wise with the kernel fused, which takes a row optimizer given by "
                "apply_optimizer_in_backward (train.row_optimizer.mode: fused)"
            )
        return [each for kernel in _kernels(holder) for each in _fused_rows(kernel, table, method)]
    weight = holder.embedding_bags[table].weight  # type: ignore[union-attr, index]
    assert isinstance(weight, nn.Parameter)
    return [_attached_rows(weight, table, method)]


def have_optimizers(holder: nn.Module, tables: Sequence[str]) -> bool:
    """Whether rows of tables were given optimizers; those of sharded ones are asked when they are written.

    Args:
        holder: TorchRec's collection, sharded or not.
        tables: physical tables.
    """
    if isinstance(holder, ShardedEmbeddingBagCollection):
        return True
    weights = [holder.embedding_bags[table].weight for table in tables]  # type: ignore[union-attr, index]
    return all(getattr(weight, "_in_backward_optimizers", ()) for weight in weights)


class HeldOptimizers:
    """Finds the optimized rows of physical tables in what holds them, once: the tensors stay as long as it does."""

    def __init__(self) -> None:
        self._known: dict[str, list[OptimizedRows]] = {}
        self._of: nn.Module | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": {}, "_of": None}

    def find(
        self, holder: nn.Module, tables: Sequence[str], method: str
    ) -> Mapping[str, Sequence[OptimizedRows]]:
        """What `optimized_rows` says of each table."""
        if self._of is not holder:
            self._known = {table: optimized_rows(holder, table, method) for table in tables}
            self._of = holder
        return self._known


def _kernels(holder: ShardedEmbeddingBagCollection) -> Iterator[BatchedFusedEmbeddingBag]:
    for lookup in holder._lookups:  # a plain list, which modules() does not enter
        for module in lookup.modules():
            if isinstance(module, BatchedFusedEmbeddingBag):
                yield module


def _fused_rows(
    kernel: BatchedFusedEmbeddingBag, table: str, method: str
) -> Iterator[OptimizedRows]:
    module = kernel.emb_module
    assert isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)
    for place, held in enumerate(kernel._config.embedding_tables):
        if held.name != table:
            continue
        if module.optimizer not in _FUSED:
            raise ConfigError(
                f"{method}: rows of table {table!r} have the row optimizer {module.optimizer}; {_WAY_OUT}"
            )
        states = module.split_optimizer_states()[place] if _keeps_sums(module) else []
        offsets = held.local_metadata.shard_offsets if held.local_metadata else [0, 0]
        yield OptimizedRows(
            weight=module.split_embedding_weights()[place].detach(),
            first_row=offsets[0],
            rule=_FUSED[module.optimizer],
            rate=module.get_learning_rate,
            eps=module.optimizer_args.eps,
            sums=states[0] if states else None,
            most=module.optimizer_args.max_gradient
            if module.optimizer_args.gradient_clipping
            else None,
        )


def _keeps_sums(module: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    return _FUSED[module.optimizer] != "sgd"


def _rate_of(group: Mapping[str, Any]) -> float:
    return float(group["lr"])


def _attached_rows(weight: nn.Parameter, table: str, method: str) -> OptimizedRows:
    for optimizer in getattr(weight, "_in_backward_optimizers", ()):
        (group,) = optimizer.param_groups
        rule: RowRule | None = None
        if type(optimizer) is torch.optim.SGD and not group["momentum"]:
            rule = "sgd"
        elif type(optimizer) is RowWiseAdagrad:
            rule = "rowwise_adagrad"
        if rule is None or group.get("weight_decay"):
            raise ConfigError(
                f"{method}: rows of table {table!r} have the row optimizer {type(optimizer).__name__}; "
                f"{_WAY_OUT}, without momentum or weight decay"
            )
        return OptimizedRows(
            weight=weight.detach(),
            first_row=0,
            rule=rule,
            rate=partial(_rate_of, group),
            eps=group.get("eps", 0.0),
            sums=None if rule == "sgd" else optimizer.state[weight]["sum"].view(-1),
        )
    raise ConfigError(
        f"{method}: nothing says how fast rows of table {table!r} learn, as no gradient reaches stored integers. "
        "Give them a row optimizer by torch's _apply_optimizer_in_backward, then shard the model by "
        "DistributedModelParallel or leave it as it is; embcomp train does so in mode: fused"
    )
