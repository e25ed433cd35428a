"""Tensors that follow from others, made anew when those have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Derived:
    """What was made of some tensors last; copies of it make their own."""

    def __init__(self) -> None:
        self._sources: list[Tensor] = []
        self._versions: list[int] = []
        self._found: Tensor | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_sources": [], "_versions": [], "_found": None}

    def of(self, sources: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """The result for these tensors; part of the program where one is compiled.

        Args:
            sources: followed by memory and version, as checkpoints are read into buffers without
                asking their module. What is written through `data` changes neither.
            make: makes it; without gradients.
        """
        if torch.compiler.is_compiling():
            return make()
        versions = [0 if each.is_inference() else each._version for each in sources]
        same = versions == self._versions and all(
            own is each or (own.device == each.device and own.data_ptr() == each.data_ptr())
            for own, each in zip(self._sources, sources)
        )
        if self._found is None or not same:
            with torch.inference_mode(False), torch.no_grad():  # as training may want it next
                self._found = make()
            # Held, so that no other tensor gets their memory.
            self._sources, self._versions = list(sources), versions
        return self._found
