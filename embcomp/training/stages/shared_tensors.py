"""Tensors that one rank makes and all ranks read: on a host they are in memory once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch.distributed as dist
from torch import Tensor

from embcomp.training.distributed.process import Process


class SharedTensors:
    """Hands out tensors by way of files that every rank maps; one process keeps its own.

    Args:
        folder: where the files are until `release`; all ranks see it.
        process: the process group.
    """

    def __init__(self, folder: Path, process: Process) -> None:
        self._folder, self._process = folder, process
        self._files: list[Path] = []

    def get(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` returns on the first rank; every rank calls it, none changes the tensors.

        Args:
            name: unique among the names that were asked for.
            make: is called on the first rank alone, and calls no collective.
        """
        if self._process.world_size == 1:
            return dict(make())
        path = self._folder / f".shared-{name}.safetensors"
        if self._process.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            tensors = {key: value.contiguous() for key, value in make().items()}
            safetensors.torch.save_file(tensors, path)
        self._files.append(path)
        dist.barrier()
        return safetensors.torch.load_file(path)

    def release(self) -> None:
        """Remove the files once every rank is here; tensors stay readable."""
        dist.barrier()
        if self._process.is_main:
            for path in self._files:
                path.unlink(missing_ok=True)
        self._files.clear()
