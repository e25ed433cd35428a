"""The loss of several labels at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embcomp.errors import ConfigError


class MultiTaskLoss(nn.Module):
    """The weighted sum of each label's binary cross-entropy, of which any row's may be unknown.

    A task's loss is its sum over the rows that know the label, over all rows: so ranks with batches of
    one size together have the loss of one process, whatever they know, and a label that few rows know
    pulls less, as long as its weight does not say otherwise.

    Args:
        weights: of each task, in the order of its labels; none negative, one or more positive.

    Raises:
        ConfigError: for weights that are not.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        fits = all(0 <= weight < float("inf") for weight in weights)
        if not fits or not any(weights):
            raise ConfigError(
                f"weights: expected a finite number of at least 0 for each task, one of them positive, got "
                f"{list(weights)}"
            )
        self.weights = tuple(map(float, weights))

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The tasks' losses by themselves, before they are weighed: (T,).

        Args:
            logits: (B, T).
            labels: (B, T) float, from 0 to 1; NaN where a row does not know a label.
        """
        if logits.shape != labels.shape or logits.shape[1:] != (len(self.weights),):
            raise ValueError(
                f"expected logits and labels of shape (B, {len(self.weights)}), got {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}"
            )
        known = ~labels.isnan()
        found = F.binary_cross_entropy_with_logits(
            logits, labels.nan_to_num(), weight=known.to(logits.dtype), reduction="none"
        )
        return found.sum(0) / max(len(labels), 1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss () of a batch; see `each`."""
        losses = self.each(logits, labels)
        return (losses * torch.tensor(self.weights, device=losses.device)).sum()
