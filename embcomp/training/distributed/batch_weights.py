"""The weights of a batch's rows, which ranks hold in shares, brought to a mean of 1."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def of_mean_one(weights: Tensor, num_valid: int | None, *, over_ranks: bool) -> Tensor:
    """Divide weights by their mean, so that the mean of weighted losses is the weighted mean of losses.

    Weights that are all 1 stay 1 to the bit, and a common factor goes out. On ranks the mean is that of
    the rows of all of them, for which every rank waits; nothing comes back to the host.

    Args:
        weights: (B,) float32, at least 0.
        num_valid: how many leading rows are this rank's own; None means all.
        over_ranks: whether the batches of all ranks are one.

    Returns:
        (B,) float32; zeros where no row of the batch has a weight.
    """
    own = len(weights) if num_valid is None else num_valid
    total = weights[:own].sum(dtype=torch.float64)
    sums = torch.stack((total, torch.full_like(total, own)))
    if over_ranks and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    mean = sums[0] / sums[1]
    return torch.where(mean > 0, weights.double() / mean, 0.0).float()
