"""Mixed precision: which part of a step runs in bfloat16, and where that is faster."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from embcomp.errors import ConfigError


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


def check_bf16(device: torch.device) -> None:
    """Raise a ConfigError unless a device multiplies in bfloat16 by itself."""
    if device.type == "cpu" and not cpu_has_bf16():
        raise ConfigError(
            "train.precision: bf16 needs CUDA, or a CPU with AVX512-BF16 or AMX; this CPU (torch "
            f"takes it for {torch.backends.cpu.get_cpu_capability()}) would emulate it, slower than "
            "fp32. Use fp32"
        )


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products in bfloat16, and torch the library to use them."""
    # torch has no public question for either; a version without ours is taken to say no.
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has = any(getattr(torch.cpu, name, lambda: False)() for name in asked)
    return has and torch.backends.mkldnn.is_available()
