"""Gates that open for rows whose norm is above a learnt threshold.

The row pruning of Lyu et al., "OptEmbed", CIKM 2022, https://arxiv.org/abs/2208.04482. Norms are
measured in units of their own running mean, where public code takes them as they are: the gradient
of the step is zero beyond a distance of 1, so with raw norms neither thresholds nor gates would learn
unless width and initial weights happened to make norms of that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from typing_extensions import override

from embcomp.backends.widths.gates_compiled import gate_grads, gated, is_readable
from embcomp.layers.learned_buffers import LearnedBuffers
from embcomp.layers.named_parts import NamedParts

Norm = Literal[1, 2]

_MOMENTUM = 0.99


class Step(torch.autograd.Function):
    """1 where the argument is positive, else 0, with a gradient for lack of a useful one.

    The gradient is `2 - 4 |u|` up to a distance of 0.4, then 0.4 up to 1, then nothing.
    """

    @staticmethod
    @override
    def forward(ctx: FunctionCtx, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grad * _slope(u)


def _slope(u: Tensor) -> Tensor:
    """What `Step` says is its derivative."""
    far = u.abs()
    return torch.where(far <= 0.4, 2 - 4 * far, torch.where(far <= 1, 0.4, 0.0))


class GatedPrefixes(torch.autograd.Function):
    """Rows whose gate is open, cut to prefixes: `rows * Step(u) * (column < width)`, `u` of the rows' norms.

    Nothing as large as the rows is kept.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        rows: Tensor,
        norms: Tensor,
        mean: Tensor,
        threshold: Tensor,
        widths: Tensor | None,
        norm: Norm,
    ) -> Tensor:
        # (N, D), (N,), (), (), (N,) -> (N, D)
        u = relative_norms(norms, mean) - threshold
        ctx.save_for_backward(rows, norms, mean, u, widths)
        ctx.norm = norm
        if is_readable(rows, u, widths):
            return gated(rows, u, widths)
        return rows * _prefixes(rows, widths) * (u > 0).unsqueeze(1)

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, norms, mean, u, widths = ctx.saved_tensors
        grad = grad.contiguous()
        if is_readable(rows, grad, norms, u, widths):
            unit = float(mean) if mean > 0 else 1.0
            found, pulls = gate_grads(rows, grad, norms, u, widths, norm=ctx.norm, mean=unit)
        else:
            grad = grad * _prefixes(rows, widths)
            pulls = (grad * rows).sum(1) * _slope(u)
            along = rows.sign() if ctx.norm == 1 else rows / norms.unsqueeze(1)
            found = along * relative_norms(pulls, mean).unsqueeze(1) + grad * (u > 0).unsqueeze(1)
        return found, None, None, -pulls.sum(), None, None


def _prefixes(rows: Tensor, widths: Tensor | None) -> Tensor | bool:
    """(N, D) which columns of rows (N, D) are left by widths (N,); True for all."""
    if widths is None:
        return True
    return torch.arange(rows.shape[1], device=rows.device) < widths.unsqueeze(1)


def row_norms(rows: Tensor, norm: Norm) -> Tensor:
    """(..., D) -> (...) the rows' L1 or L2 norms."""
    return rows.abs().sum(-1) if norm == 1 else rows.square().sum(-1).sqrt()


def relative_norms(norms: Tensor, means: Tensor) -> Tensor:
    """Norms over their mean; as they are where no mean was measured yet."""
    return norms / torch.where(means > 0, means, 1.0)


class NormMeans(LearnedBuffers):
    """The running mean of the norms of the rows that training looks up, table by table.

    Args:
        tables: names of the group's tables.
    """

    means: Tensor

    def __init__(self, tables: Sequence[str]) -> None:
        super().__init__()
        self.store_in_parts("means", [(table, 1) for table in tables])
        self.register_buffer("means", torch.zeros(len(tables)))

    @override
    def reset_buffers(self) -> None:
        self.means.zero_()

    @torch.no_grad()
    def update(self, counted: Tensor, tables: Tensor, *, shared: bool) -> None:
        """Take in the rows of a step.

        Args:
            counted: (2, pairs) the sum of the norms of each pair's rows, and how many they are.
            tables: (pairs,) the table of each pair.
            shared: whether other ranks have the rest of the step's rows.
        """
        self.ensure_filled()
        total = counted.new_zeros(2, len(self.means)).index_add_(1, tables, counted)
        if shared and dist.get_world_size() > 1:
            dist.all_reduce(total)
        found = total[0] / total[1].clamp(min=1)
        moved = torch.where(self.means > 0, _MOMENTUM * self.means + (1 - _MOMENTUM) * found, found)
        self.means.copy_(torch.where(total[1] > 0, moved, self.means))

    def forward(self) -> Tensor:
        """(tables,) the means; 0 where nothing was looked up."""
        self.ensure_filled()
        return self.means


class Thresholds(NamedParts):
    """One threshold a table, in units of the mean norm; all rows but those of zeros pass at first.

    Args:
        tables: names of the group's tables.
    """

    def __init__(self, tables: Sequence[str]) -> None:
        super().__init__()
        self.store_in_parts("values", [(table, 1) for table in tables])
        self.values = nn.Parameter(torch.empty(len(tables)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to zero."""
        nn.init.zeros_(self.values)

    def forward(self) -> Tensor:
        """(tables,) the thresholds."""
        return self.values
