"""Counts the operations that torch dispatches, and tells which of them make the host wait."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {
    "aten._local_scalar_dense",  # item(), tolist() of one, bool(), int(), float()
    "aten.item",
    "aten.is_nonzero",
    "aten.equal",
    "aten.nonzero",
    "aten.masked_select",
    "aten.unique_dim",
    "aten.unique_consecutive",
    "aten._unique2",
}
_BY_INDEX = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}
_LAUNCH_NOTHING = {
    "aten._unsafe_view",
    "aten.alias",
    "aten.detach",
    "aten.empty",
    "aten.empty_like",
    "aten.lift_fresh",
    "aten.new_empty",
}
_WRAPPERS = ("torch/_", "torch/utils/", "torch/nn/modules/module.py")


class Dispatched(TorchDispatchMode):
    """What is dispatched within the context, views included, in backward passes as well.

    Attributes:
        total: how many operations were.
        launches: how many of them start work on a device: no views, no memory that is not filled.
        reads: those for whose result, or its size, the host waits for the device: name, and file and
            line that asked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.launches = 0
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.total += 1
        name = str(func.overloadpacket)
        self.launches += not func.is_view and name not in _LAUNCH_NOTHING
        if _waits(name, args, kwargs):
            self.reads[f"{name} at {_asker()}"] += 1
        return func(*args, **kwargs)


def _waits(name: str, args: tuple, kwargs: dict) -> bool:
    if name in _BY_INDEX:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "aten.repeat_interleave":
        return kwargs.get("output_size") is None
    return name in _READS


def _asker() -> str:
    """The innermost line of Python that is not one of torch's wrappers."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename.split("site-packages/")[-1]
        if not path.startswith(_WRAPPERS):
            return f"{'/'.join(Path(path).parts[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "nowhere"
