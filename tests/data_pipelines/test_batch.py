"""Batch moves whole: every tensor and the count of real rows."""

from __future__ import annotations

from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from embcomp.data_pipelines.loader.batch import Batch


def _batch(groups: bool = True) -> Batch:
    sparse = KeyedJaggedTensor(
        keys=["a", "b"],
        values=torch.arange(6),
        lengths=torch.ones(6, dtype=torch.int32),
        stride=3,
    )
    return Batch(
        dense=torch.arange(6, dtype=torch.float32).view(3, 2),
        sparse=sparse,
        labels=torch.tensor([0.0, 1.0, 0.0]),
        groups=torch.tensor([4, 4, 5]) if groups else None,
        num_valid=2,
    )


def test_is_pipelineable():
    assert isinstance(_batch(), Pipelineable)


def test_to_moves_every_tensor_and_keeps_num_valid():
    moved = _batch().to(torch.device("meta"), non_blocking=True)
    for tensor in (moved.dense, moved.labels, moved.sparse.values()):
        assert tensor.device.type == "meta"
    assert moved.groups is not None
    assert moved.groups.device.type == "meta"
    assert moved.num_valid == 2


def test_to_the_same_device_keeps_values():
    batch = _batch()
    moved = batch.to(torch.device("cpu"))
    torch.testing.assert_close(moved.dense, batch.dense)
    torch.testing.assert_close(moved.sparse.values(), batch.sparse.values())
    assert moved.sparse.keys() == ["a", "b"]


def test_absent_groups_stay_absent():
    assert _batch(groups=False).to(torch.device("cpu")).groups is None


def test_record_stream_reaches_every_tensor():
    class Recorder:
        def __init__(self, log, name):
            self.log, self.name = log, name

        def record_stream(self, stream):
            self.log.append((self.name, stream))

    log: list[tuple[str, str]] = []
    names = ("dense", "sparse", "labels", "groups")
    parts: list[Any] = [Recorder(log, name) for name in names]
    stream: Any = "stream"
    Batch(*parts).record_stream(stream)
    assert sorted(log) == sorted((name, "stream") for name in names)


def test_pin_memory_reaches_every_tensor():
    class Pinnable:
        pinned = False

        def pin_memory(self):
            copy = Pinnable()
            copy.pinned = True
            return copy

    parts: list[Any] = [Pinnable() for _ in range(4)]
    pinned: Any = Batch(*parts, num_valid=1).pin_memory()
    for part in (pinned.dense, pinned.sparse, pinned.labels, pinned.groups):
        assert part.pinned
    assert pinned.num_valid == 1
