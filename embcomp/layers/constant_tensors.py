"""Constant tensors that survive `meta` builds and sharding.

Buffers do not: DistributedModelParallel materialises those of a `meta` module as zeros and never
broadcasts them, so a hash whose salts were buffers would send every id to one row, in silence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embcomp.layers.host_values import on_device


class Constant:
    """Integers that a config fixes, as a tensor on whatever device asks for them.

    Args:
        values: the integers, in order.
        shape: shape of the tensor; `(len(values),)` when not given.
    """

    def __init__(self, values: Sequence[int], shape: tuple[int, ...] | None = None) -> None:
        self._values = list(values)
        self._shape = shape or (len(self._values),)
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The constant as an int64 tensor on `device`, made once per device."""
        found = self._on.get(device)
        if found is None:
            if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
                with torch.inference_mode(False):  # as training may want it next
                    return self.on(device)
            found = on_device(self._values, device).view(self._shape)
            # torch.export would leave its own stand-in for the tensor behind.
            if not torch.compiler.is_exporting():
                self._on[device] = found
        return found

    @classmethod
    def stacked(cls, *constants: Constant) -> Constant:
        """Constants of one length as rows of one."""
        values = [value for constant in constants for value in constant._values]
        return cls(values, (len(constants), len(constants[0]._values)))
