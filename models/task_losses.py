"""The loss of several labels at once."""

from __future__ import annotations

import math
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
        listed = list(weights) if isinstance(weights, Sequence) else [weights]
        if not all(map(_is_weight, listed)) or not any(listed):
            raise ConfigError(
                f"weights: expected a finite number of at least 0 for each task, one of them positive, got "
                f"{listed}"
            )
        self.weights = tuple(map(float, weights))

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The tasks' losses by themselves, before they are weighed: (T,).

        Args:
            logits: (B, T).
            labels: (B, T) of any type, from 0 to 1; NaN where a row does not know a label.

        Raises:
            ValueError: for another shape, or a label that is none, where it is seen without waiting for a device.
        """
        if logits.shape != labels.shape or logits.shape[1:] != (len(self.weights),):
            raise ValueError(
                f"expected logits and labels of shape (B, {len(self.weights)}), got {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}"
            )
        labels = labels.to(logits.dtype)
        _check_labels(labels)
        known = ~labels.isnan()
        # What a row does not know has no gradient, whatever the logit is.
        found = F.binary_cross_entropy_with_logits(
            torch.where(known, logits, 0), torch.where(known, labels, 0), reduction="none"
        )
        return torch.where(known, found, 0).sum(0) / max(len(labels), 1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss () of a batch; see `each`."""
        losses = self.each(logits, labels)
        return (losses * torch.tensor(self.weights, device=losses.device)).sum()


def _is_weight(given: object) -> bool:
    if isinstance(given, bool) or not isinstance(given, int | float):
        return False
    return 0 <= given < math.inf


def _check_labels(labels: Tensor) -> None:
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    odd = ((labels < 0) | (labels > 1)).nonzero()
    if len(odd):
        row, task = odd[0].tolist()
        raise ValueError(
            f"labels: expected numbers from 0 to 1, or NaN where one is not known; row {row} has "
            f"{labels[row, task].item():g} for task {task}"
        )
