"""A step of rows that are stored as integers: float weights of the touched rows alone, then integers again.

Rounding is stochastic: up with the probability of the part that is cut off, so that what is below a step is
right on average (to the nearest, a weight whose updates are shorter than half a step would never move).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from embcomp.backends.integer_rows.integer_cells import LIMITS, Bits, packed, unpacked
from embcomp.layers.hashing import hash_rows, to_signed

Steps = Literal["fixed", "range", "learnt"]

_ROOM = (
    1.125  # what a step is longer than its row's largest weight needs, so that it changes seldom
)
_LEAST_USED = 0.25  # of the range: below it, steps become shorter
_LEAST_STEP = 1e-30
_MOST_CHANGE = 0.1  # of a learnt step in one update
_PARTS = 1 << 24  # of one, as fine as float32 is below it


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """How stored rows take updates in.

    Args:
        bits: 8 or 16.
        steps: whether a row's step stays, follows the row's largest weight, or is learnt.
        step_rate: learning rate of learnt steps, as a share of the row's own.
    """

    bits: Bits
    steps: Steps
    step_rate: float = 0.0

    def updated(self, rows: Tensor, gradients: Tensor, rates: Tensor, parts: Tensor) -> Tensor:
        """Rows after a step of gradient descent.

        Args:
            rows: (N, cells + 1) float32, stored.
            gradients: (N, D) float32.
            rates: (N, 1) learning rates.
            parts: (N, D) uniform draws from [0, 1).

        Returns:
            (N, cells + 1) float32.
        """
        limit = LIMITS[self.bits]
        integers, before = unpacked(rows, gradients.shape[1], self.bits)
        moves = rates * gradients
        places = integers - moves / before  # what is not pulled at is where it was, to the bit
        steps = self._steps(before, places, moves)
        places = integers * (before / steps) - moves / steps
        rounded = (places + parts).floor().clamp(-limit, limit)
        return packed(rounded.to(torch.int32), steps.squeeze(1), self.bits)

    def _steps(self, steps: Tensor, places: Tensor, moves: Tensor) -> Tensor:
        """(N, 1) steps after the update.

        Args:
            steps: before.
            places: (N, D) updated weights, counted in these steps.
            moves: (N, D) what was taken from weights.
        """
        limit = LIMITS[self.bits]
        if self.steps == "fixed":
            return steps
        if self.steps == "range":
            used = places.abs().amax(dim=1, keepdim=True) / limit
            changes = (used > 1) | (used < _LEAST_USED)
            return torch.where(changes, (steps * used * _ROOM).clamp(min=_LEAST_STEP), steps)
        # LSQ's gradient: inside the range what rounding adds, outside the end of the range.
        pulls = torch.where(places.abs() < limit, places.round() - places, places.sign() * limit)
        scale = (moves.shape[1] * limit) ** -0.5
        change = self.step_rate * scale * (moves * pulls).sum(dim=1, keepdim=True)
        most = _MOST_CHANGE * steps
        return (steps - change.clamp(-most, most)).clamp(min=_LEAST_STEP)


def rounding_draws(rows: Tensor, width: int, salt: int, update: Tensor) -> Tensor:
    """Uniform draws from [0, 1) that depend on the row, its column and the update alone.

    Args:
        rows: (N,) int64 rows of the table.
        width: D.
        salt: of the table.
        update: () int64, which update of the table it is.

    Returns:
        (N, D) float32.
    """
    columns = torch.arange(width, device=rows.device)
    salts = update * to_signed(0x9E3779B97F4A7C15) + salt
    parts = torch.tensor(_PARTS, device=rows.device)
    return hash_rows(rows.unsqueeze(1) * width + columns, salts, parts).float() / _PARTS
