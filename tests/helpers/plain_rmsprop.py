"""Row-wise RMSprop with adaptive decay on whole tables, in plain torch and double precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embcomp.config.train_config import RowOptimizerConfig


class PlainRmspropAr:
    """A row counts as looked up where its gradient is not all zeros.

    Args:
        rows: whole tables.
        options: settings of the optimizer.
    """

    def __init__(self, rows: Sequence[Tensor], options: RowOptimizerConfig) -> None:
        self._rows, self._options = rows, options
        self.param_groups = [{"lr": options.learning_rate}]
        self.means = [torch.zeros(len(weight), dtype=torch.float64) for weight in rows]
        self.last = [torch.zeros(len(weight), dtype=torch.float64) for weight in rows]
        self.decayed: set[float] = set()
        self._step = 0

    @torch.no_grad()
    def step(self) -> None:
        self._step += 1
        options, rate = self._options, self.param_groups[0]["lr"]
        for weight, mean, last in zip(self._rows, self.means, self.last):
            assert weight.grad is not None
            gradient = weight.grad.double()
            met = gradient.abs().sum(dim=1) > 0
            rested = torch.where(last == 0, 1.0, self._step - last)
            kept = (1 - rate * options.ar_alpha * rested).clamp(min=options.min_shrinkage)
            squares = gradient.pow(2).mean(dim=1)
            mean[met] = (options.ema_beta * mean + (1 - options.ema_beta) * squares)[met]
            last[met] = float(self._step)
            self.decayed |= set(kept[met].tolist())
            moved = rate / (mean.sqrt() + options.eps)
            new = kept[:, None] * weight.double() - moved[:, None] * gradient
            weight[met] = new[met].to(weight.dtype)
