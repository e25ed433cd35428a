"""How many training steps a method has seen, as checkpoints keep it and without a look at the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from embcomp.layers.learned_buffers import LearnedBuffers


class StepCount(LearnedBuffers):
    """Counts training steps.

    Attributes:
        count: (1,) int64, or (tables,) with the same number for each.

    Args:
        tables: their names, where each is to have the number by itself; else it is the group's.
    """

    count: Tensor

    def __init__(self, tables: Sequence[str] = ()) -> None:
        super().__init__()
        if tables:
            self.store_in_parts("count", [(name, 1) for name in tables])
        self.register_buffer("count", torch.zeros(max(1, len(tables)), dtype=torch.int64))
        self._known: tuple[Tensor, int, int] | None = None  # the tensor, its version and its value

    @override
    def reset_buffers(self) -> None:
        self.count.zero_()

    def known(self) -> int:
        """How many there were; the tensor is only looked at where someone else has written to it."""
        if self.count.is_meta:
            return 0
        self.ensure_filled()
        known = self._known
        if known is None or known[0] is not self.count or known[1] != self.count._version:
            known = self._known = (self.count, self.count._version, int(self.count.max()))
        return known[2]

    def next(self) -> int:
        """Count a step."""
        step = self.known() + 1
        self.count.add_(1)
        self._known = (self.count, self.count._version, step)
        return step
