"""Weight decay of fused rows, paid by a row when it is touched.

Fused kernels write touched rows only, and on CPU they ignore weight decay altogether. Decoupled decay
multiplies every row by `1 - learning_rate * weight_decay` at the start of every step. Here a row
gets all the factors that it has missed at once: just before it is looked up, and in `flush` before
anyone else reads the table. The factors act on the shard's owner, inside the look-up, so sharding
does not show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from embcomp.layers.constant_tensors import Constant
from embcomp.layers.host_values import reads_wait

_ROWS_AT_ONCE = 1 << 18  # of a table, when all are paid


class LazyDecay:
    """Decays the fused rows of a sharded model.

    It keeps one float32 per local row: the logarithm of the factors that the row has had since the
    last flush. A flush leaves nothing behind, so checkpoints made after one need no state of it.

    Args:
        sharded: the model after sharding.
        weight_decay: multiplied by the learning rate of each step.
    """

    def __init__(self, sharded: nn.Module, weight_decay: float) -> None:
        self._weight_decay = weight_decay
        self._due = 0.0  # logarithm of all factors since the last flush
        self._kernels = [_Kernel(module) for module in fused_kernels(sharded)]
        for kernel in self._kernels:
            kernel.module.register_forward_pre_hook(self._before_look_up(kernel), with_kwargs=True)

    def start_step(self, learning_rate: float) -> None:
        """Owes every row the factor of a step that begins."""
        self._due += math.log1p(-learning_rate * self._weight_decay)

    @torch.no_grad()
    def flush(self) -> None:
        """Pay every row what it is owed."""
        if self._due == 0.0:
            return
        for kernel in self._kernels:
            kernel.pay_all(self._due)
        self._due = 0.0

    def _before_look_up(self, kernel: _Kernel) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            if torch.is_grad_enabled() and self._due != 0.0:
                with torch.no_grad():
                    kernel.pay(kwargs["indices"], kwargs["offsets"], self._due)

        return hook


def fused_kernels(sharded: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """The kernels of a model's fused rows; none on a rank that holds no table."""
    for collection in sharded.modules():
        if isinstance(collection, ShardedEmbeddingBagCollection):
            for lookup in collection._lookups:  # a plain list, which modules() does not enter
                for module in lookup.modules():
                    if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
                        yield module


class _Kernel:
    """The tables of one fused kernel and what their rows have paid.

    Args:
        module: FBGEMM's module; several features may read one of its tables.
    """

    def __init__(self, module: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        self.module = module
        self._table_of_feature = list(module.feature_table_map)
        self._weights: list[Tensor] = module.split_embedding_weights()
        first = self._weights[0]
        sizes = [len(weight) for weight in self._weights]
        self._paid = torch.zeros(sum(sizes), device=first.device)
        self._paid_by_table = self._paid.split(sizes)
        self._flat = _shared_storage(self._weights)
        read = self._table_of_feature
        self._dims = Constant([self._weights[table].shape[1] for table in read])
        self._firsts = Constant([self._weights[table].storage_offset() for table in read])
        self._first_paid = Constant([sum(sizes[:table]) for table in read])

    def pay(self, indices: Tensor, offsets: Tensor, due: float) -> None:
        """Pay the rows that are about to be looked up.

        Args:
            indices: (N,) row ids, feature by feature.
            offsets: (features * B + 1,) where each bag begins.
            due: logarithm of all factors since the last flush.
        """
        features = len(self._table_of_feature)
        batch = (offsets.numel() - 1) // features
        bounds = offsets[torch.arange(features + 1, device=offsets.device) * batch]
        # Repeated ids write the same value, so the result does not depend on their order.
        if self._flat is not None and reads_wait(indices.device):
            self._pay_at_once(self._flat, indices.long(), bounds, due)
            return
        ends = bounds.tolist()
        for feature, table in enumerate(self._table_of_feature):
            ids = indices[ends[feature] : ends[feature + 1]].long()
            weight, paid = self._weights[table], self._paid_by_table[table]
            factors = torch.exp(due - paid[ids].double()).to(weight.dtype)
            weight[ids] = weight[ids] * factors.unsqueeze(1)
            paid[ids] = due

    def _pay_at_once(self, flat: Tensor, ids: Tensor, bounds: Tensor, due: float) -> None:
        """The same for all tables in one pass, which does not ask where a feature's ids end."""
        place = torch.arange(len(ids), device=ids.device)
        feature = torch.searchsorted(bounds[1:].long(), place, right=True)
        feature.clamp_(max=len(self._table_of_feature) - 1)
        dims, firsts, first_paid = (
            constant.on(ids.device)[feature]
            for constant in (self._dims, self._firsts, self._first_paid)
        )
        rows = first_paid + ids
        factors = torch.exp(due - self._paid[rows].double()).to(flat.dtype)
        widest = max(self._weights[table].shape[1] for table in self._table_of_feature)
        # Narrower rows have their last column written several times, with one value.
        columns = torch.arange(widest, device=ids.device).minimum((dims - 1).unsqueeze(1))
        elements = (firsts + ids * dims).unsqueeze(1) + columns
        flat[elements] = flat[elements] * factors.unsqueeze(1)
        self._paid.index_fill_(0, rows, due)

    def pay_all(self, due: float) -> None:
        """Pay all rows and forget what they paid before."""
        for whole, paid_by_all in zip(self._weights, self._paid_by_table):
            for weight, paid in zip(whole.split(_ROWS_AT_ONCE), paid_by_all.split(_ROWS_AT_ONCE)):
                weight.mul_(torch.exp(due - paid.double()).to(weight.dtype).unsqueeze(1))
                paid.zero_()


def _shared_storage(weights: Sequence[Tensor]) -> Tensor | None:
    """The numbers of which all weights are rows one after another; None where they lie apart."""
    first = weights[0].detach()
    places = {weight.untyped_storage().data_ptr() for weight in weights}
    if len(places) > 1:
        return None
    size = max(weight.storage_offset() + weight.numel() for weight in weights)
    return first.as_strided((size,), (1,), 0)
