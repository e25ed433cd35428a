"""Mixed precision: which part of a step runs in bfloat16."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


class Precision:
    """Makes autocast contexts.

    Args:
        enabled: whether dense layers run in bfloat16.
        device: where they run.
    """

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self._enabled, self._device = enabled, device

    def __call__(self) -> AbstractContextManager[object]:
        """A new context."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._enabled)
