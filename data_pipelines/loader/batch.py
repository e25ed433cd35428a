"""One batch of click rows, as TorchRec's train pipelines move it between devices and streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable
from typing_extensions import override


@dataclass
class Batch(Pipelineable):
    """Rows that a model scores together.

    Attributes:
        dense: (B, I) float32, the numeric columns in the dataset's order.
        sparse: ids of the categorical features, keys in the dataset's order, stride B.
        labels: (B,) float32, 1 for a click and 0 for none.
        weights: (B,) float32, how much each row counts; None where all count the same.
        groups: (B,) int64 ids of the feature that grouped AUC groups by, if the dataset names one.
        num_valid: how many leading rows count; None means all. The rest are rows that another rank
            counts, there so that all ranks take the same number of equally large steps.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    labels: Tensor
    groups: Tensor | None = None
    num_valid: int | None = None
    weights: Tensor | None = None

    @override
    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(
            dense=self.dense.to(device, non_blocking=non_blocking),
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            groups=None
            if self.groups is None
            else self.groups.to(device, non_blocking=non_blocking),
            num_valid=self.num_valid,
            weights=None
            if self.weights is None
            else self.weights.to(device, non_blocking=non_blocking),
        )

    @override
    def record_stream(self, stream: torch.Stream) -> None:
        self.dense.record_stream(stream)
        self.sparse.record_stream(stream)
        self.labels.record_stream(stream)
        if self.groups is not None:
            self.groups.record_stream(stream)
        if self.weights is not None:
            self.weights.record_stream(stream)

    def pin_memory(self) -> Batch:
        """Return a copy in page-locked memory, from which copies to a GPU overlap with its work."""
        return Batch(
            dense=self.dense.pin_memory(),
            sparse=self.sparse.pin_memory(),
            labels=self.labels.pin_memory(),
            groups=None if self.groups is None else self.groups.pin_memory(),
            num_valid=self.num_valid,
            weights=None if self.weights is None else self.weights.pin_memory(),
        )
