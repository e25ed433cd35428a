"""What the ranks of a run see together, as the batches of one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from embcomp.data_pipelines.loader.batch import Batch
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.testing.check_data import joined
from embcomp.training import data, loop
from embcomp.training.distributed.process import Process


class JoinedLoader:
    """Joins the batches that several ranks would train on, first rank first."""

    def __init__(self, loaders: list[ParquetLoader]) -> None:
        self._loaders = loaders
        self.num_rows = loaders[0].num_rows
        self.batch_size = loaders[0].batch_size * len(loaders)

    def __len__(self) -> int:
        return len(self._loaders[0])

    def set_epoch(self, epoch: int) -> None:
        for loader in self._loaders:
            loader.set_epoch(epoch)

    def state_dict(self, step: int | None = None) -> dict:
        return self._loaders[0].state_dict(step)

    def load_state_dict(self, state: dict) -> None:
        for loader in self._loaders:
            loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        for parts in zip(*self._loaders):
            yield Batch(
                dense=torch.cat([part.dense for part in parts]),
                sparse=joined([part.sparse for part in parts]),
                labels=torch.cat([part.labels for part in parts]),
            )


@contextmanager
def batches_of_ranks(ranks: int) -> Iterator[None]:
    """Lets one process train on what so many ranks would train on together."""

    def joining(make):
        def made(config, info, process, **options):
            each = [
                make(config, info, Process(rank, ranks, process.device), **options)
                for rank in range(ranks)
            ]
            return JoinedLoader(each)

        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_batches", joining(data.training_batches))
        patch.setattr(loop, "search_batches", joining(data.search_batches))
        yield
