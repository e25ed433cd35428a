"""Rows of integers as TorchRec can hold them: four of 8 bits, or two of 16, in each float32 of an ordinary table.

A row is its cells and, in one float32 more, the step that its integers count. Tables, all-to-alls and checkpoints
hand float32 on to the bit as long as they are ordinary numbers: what is added to zeros, or multiplied by one, may lose
the mark of a NaN or the sign of a zero. So the byte that stands in a cell's exponent is never 0 or 255, for which
the integers leave out one in a hundred of their range: `[-126, 126]` and `[-32511, 32511]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from embcomp.errors import ConfigError
from embcomp.tables.specs import InitFn

Bits = Literal[8, 16]
LIMITS = {8: 126, 16: 32511}
"""The largest integer of each width, and minus the smallest."""

_LEAST_STEP = 1e-30  # far above what a processor may take for zero


def cells_of(dim: int, bits: int) -> int:
    """Cells that hold the integers of a row."""
    return -(-dim * bits // 32)


def packed(integers: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Store rows.

    Args:
        integers: (N, dim) int32 within the limits.
        steps: (N,) float32, positive.
        bits: 8 or 16.

    Returns:
        (N, cells + 1) float32.
    """
    per_cell = 32 // bits
    codes = integers + (127 if bits == 8 else 32768)
    missing = -codes.shape[1] % per_cell
    codes = torch.nn.functional.pad(codes, (0, missing), value=127 if bits == 8 else 32768)
    if bits == 16:
        codes = torch.stack((codes >> 8, codes & 255), dim=2).flatten(1)
    first, second, third, fourth = codes.unflatten(1, (codes.shape[1] // 4, 4)).unbind(2)
    cells = (second >> 7 << 31) | (first << 23) | ((second & 127) << 16) | (third << 8) | fourth
    return torch.cat([cells.view(torch.float32), steps.float().unsqueeze(1)], dim=1)


def unpacked(rows: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Take rows apart.

    Args:
        rows: (..., cells + 1) float32.
        dim: weights of a row.
        bits: 8 or 16.

    Returns:
        (..., dim) int32 and (..., 1) float32 steps, of which no gradient reaches the rows: an optimizer
        would move bits.
    """
    rows = rows.detach()
    cells, steps = rows[..., :-1].contiguous().view(torch.int32), rows[..., -1:]
    first, third, fourth = (cells >> 23) & 255, (cells >> 8) & 255, cells & 255
    second = ((cells >> 31) & 1) << 7 | (cells >> 16) & 127
    codes = torch.stack((first, second, third, fourth), dim=-1).flatten(-2)
    if bits == 16:
        high, low = codes.unflatten(-1, (codes.shape[-1] // 2, 2)).unbind(-1)
        codes = high << 8 | low
    return codes[..., :dim] - (127 if bits == 8 else 32768), steps


def weights_of(rows: Tensor, dim: int, bits: int) -> Tensor:
    """(..., dim) float32 weights of (..., cells + 1) stored rows; zeros of zeros."""
    integers, steps = unpacked(rows, dim, bits)
    return integers.float() * steps


def nearest(weights: Tensor, bits: int, step: float | None = None) -> Tensor:
    """Round rows to the nearest integers.

    Args:
        weights: (N, dim) float32.
        bits: 8 or 16.
        step: of all rows; by default each row's largest weight is its largest integer.

    Returns:
        (N, cells + 1) float32, stored rows.
    """
    limit = LIMITS[bits]
    steps = (
        weights.abs().amax(dim=1) / limit
        if step is None
        else weights.new_full((len(weights),), step)
    )
    steps = steps.clamp(min=_LEAST_STEP)
    integers = (weights / steps.unsqueeze(1)).round().clamp(-limit, limit)
    return packed(integers.to(torch.int32), steps, bits)


@dataclass(frozen=True, kw_only=True)
class IntegerInit:
    """Draws rows as for a full table and stores them.

    Args:
        draw: fills (rows, dim).
        dim: weights of a row.
        bits: 8 or 16.
        step: of all rows; None for one of each row's own.
    """

    draw: InitFn
    dim: int
    bits: int
    step: float | None = None

    def drawn_by(self, draw: InitFn) -> Self:
        """The same of weights of another distribution."""
        return replace(self, draw=draw)

    def __call__(self, weight: Tensor) -> Tensor:
        """Fill stored rows in place; columns behind them only pad."""
        wanted = cells_of(self.dim, self.bits) + 1
        if weight.shape[1] < wanted:
            raise ConfigError(
                f"int8, int16, alpt: a stored row is {wanted} columns with one step behind them, and cannot be "
                f"split by columns, as into {weight.shape[1]}; shard these tables table-wise or row-wise"
            )
        with torch.no_grad():
            weights = torch.empty(weight.shape[0], self.dim, device=weight.device)
            self.draw(weights)
            weight.zero_()
            weight[:, :wanted] = nearest(weights, self.bits, self.step)
        return weight
