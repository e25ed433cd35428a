"""The process group and device of a run: one process alone, or many started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from embcomp.errors import ConfigError

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Process:
    """Where this process stands among the ranks of a run.

    Attributes:
        rank: number of this process.
        world_size: number of processes.
        device: where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


def launched_by_torchrun() -> bool:
    """Whether the environment describes a process group, as torchrun leaves it."""
    return all(key in os.environ for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def choose_device(wanted: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; one GPU for each local rank."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but torch finds no CUDA device; use auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(f"{count} CUDA device(s) for local rank {local_rank}; start fewer ranks")
    return torch.device("cuda", local_rank)


@contextmanager
def process_group(wanted_device: str) -> Iterator[Process]:
    """Join torchrun's process group, or make one of a single process that needs no network.

    A group that exists already is used as it is and left alone.
    """
    device = choose_device(wanted_device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield Process(dist.get_rank(), dist.get_world_size(), device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if launched_by_torchrun():
        dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
