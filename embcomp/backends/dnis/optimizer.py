"""The optimizer of selections: normalised gradient descent between 0 and 1.

Cheng, Shen, Huang, "Differentiable Neural Input Search for Recommender Systems", 2020,
https://arxiv.org/abs/2006.04466. The gradient of rare blocks is smaller than that of frequent ones by
orders of magnitude; divided by its mean size within each block, every block moves at one pace.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_EPS = 1e-8


def normalized(gradient: Tensor) -> Tensor:
    """A gradient (L, K) whose mean absolute value is 1 for each block, or 0 where all of it is."""
    return gradient / (gradient.abs().mean(dim=-1, keepdim=True) + _EPS)


class SelectionSGD(torch.optim.Optimizer):
    """Descends along normalised gradients and cuts what leaves [0, 1].

    It never settles by itself: the mean step of a block is the learning rate, however flat the loss.

    Args:
        parameters: (L, K) selections, one row for each block.
        lr: mean absolute step.
        decay: after t steps the learning rate is `lr / (1 + decay * t)`.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every selection that has a gradient."""
        for group in self.param_groups:
            for selection in group["params"]:
                if selection.grad is None:
                    continue
                state = self.state[selection]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                rate = group["lr"] / (1 + group["decay"] * float(state["step"]))
                selection.sub_(normalized(selection.grad), alpha=rate).clamp_(0, 1)
                state["step"] += 1
