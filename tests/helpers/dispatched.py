"""Counts the operations that torch dispatches, by name."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = (
    "aten._local_scalar_dense",
    "aten.item",
    "aten.nonzero",
    "aten.masked_select",
    "aten.is_nonzero",
    "aten._unique2",
    "aten.unique_dim",
    "aten.unique_consecutive",
    "aten.equal",
)
"""Operations for whose result, or its size, the host waits for the device."""


class Dispatched(TorchDispatchMode):
    """What is dispatched within the context, views included, in backward passes as well."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def reads(self) -> dict[str, int]:
        """How often the host looked at a value, or selected by a mask."""
        return {name: self.counts[name] for name in READS if self.counts[name]} | (
            {"boolean index": self.counts["boolean index"]} if self.counts["boolean index"] else {}
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        self.counts[name] += 1
        if name in ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.counts["boolean index"] += 1
        if name == "aten.repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self.counts["aten.item"] += 1  # the size of the result is read
        return func(*args, **(kwargs or {}))
