"""Models on tables that TorchRec has sharded over two ranks, run by its train pipeline."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.streamable import Pipelineable

from embcomp.models import AutoIntConfig, ModelConfig
from embcomp.testing.workers import WorkerPool
from tests.helpers.long import long_but
from tests.helpers.model_cases import CASES, CONFIGS, NAMES, Batch, build, make_batch

pytestmark = pytest.mark.slow

STEPS = 3
LEARNING_RATE = 0.05
# Not in the order of the tables: the sharded collection returns user, tag, item.
RANK_OF = {"user": 0, "item": 1, "tag": 0}


class StreamableBatch(Pipelineable):
    """A batch in the form that train pipelines take."""

    def __init__(self, batch: Batch) -> None:
        self.dense, self.sparse = batch.dense, batch.sparse

    def to(self, device: torch.device, non_blocking: bool = False) -> StreamableBatch:
        return self

    def record_stream(self, stream: torch.Stream) -> None:
        pass

    def pin_memory(self) -> StreamableBatch:
        return self


class Loss(nn.Module):
    """Cross-entropy against labels that the numeric values imply."""

    def forward(self, logits: Tensor, dense: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits, (dense[:, 0] > 0).float())


class Task(nn.Module):
    """A model and its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = Loss()

    def forward(self, batch: StreamableBatch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits = self.model(batch.dense, batch.sparse)
        loss = self.loss(logits, batch.dense)
        return loss, (loss.detach(), logits.detach())


def local_batch(step: int, rank: int) -> StreamableBatch:
    return StreamableBatch(make_batch(seed=10 * step + rank))


def train_sharded(config: ModelConfig) -> tuple[int, list[float], list[list[float]]]:
    """Number of collections pipelined; losses and logits of this rank's batches while training."""
    task = Task(build(config))
    weights = {key: value.detach().clone() for key, value in task.state_dict().items()}
    plans = {
        f"model.{name}": construct_module_sharding_plan(
            tables,
            {f"t_{feature}": table_wise(rank=RANK_OF[feature]) for feature in NAMES},
            world_size=2,
            local_size=2,
            device_type="cpu",
        )
        for name, tables in task.model.named_children()
        if name in ("tables", "first_order_tables")
    }
    sharder: Any = EmbeddingBagCollectionSharder()
    device = torch.device("cpu")
    sharded = DistributedModelParallel(
        task, device=device, plan=ShardingPlan(plans), sharders=[sharder]
    )
    sharded.load_state_dict(weights)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=LEARNING_RATE)
    pipeline = TrainPipelineSparseDist(sharded, optimizer, device, pipeline_postproc=True)
    batches = iter([local_batch(step, dist.get_rank()) for step in range(STEPS)])
    results = [pipeline.progress(batches) for _ in range(STEPS)]
    losses = [loss.item() for loss, _ in results]
    logits = [out.tolist() for _, out in results]
    return len(pipeline._pipelined_modules), losses, logits


def train_whole(config: ModelConfig) -> tuple[list[list[float]], list[list[list[float]]]]:
    """The same for each rank, from one process that sees the batches of both."""
    task = Task(build(config))
    optimizer = torch.optim.SGD(task.parameters(), lr=LEARNING_RATE)
    losses: list[list[float]] = [[], []]
    logits: list[list[list[float]]] = [[], []]
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            loss, (_, out) = task(local_batch(step, rank))
            (loss / 2).backward()
            losses[rank].append(loss.item())
            logits[rank].append(out.tolist())
        optimizer.step()
    return losses, logits


# What a traced `forward` may hold of blocks, gates and shared layers; the rest repeats it.
LONG = ("fibinet", "finalmlp", "gdcn", "masknet", "pnn", "xdeepfm")
KEPT = [config for name, configs in CASES.items() if name not in LONG for config in configs]
KEPT += [CASES["fibinet"][0], CASES["finalmlp"][1], CASES["masknet"][0]]


@pytest.mark.parametrize("config", long_but(KEPT, CONFIGS), ids=str)
def test_sharded_and_pipelined_training_equals_the_whole_model(
    workers: WorkerPool, config: ModelConfig
):
    if isinstance(config, AutoIntConfig):  # dropout draws other numbers on each rank
        config = dataclasses.replace(config, attention_dropout=0.0, dropout=0.0)
    losses, logits = train_whole(config)
    assert losses[0][0] != losses[0][-1]
    collections = int(config.uses_embeddings) + int(config.uses_first_order)
    for rank, (pipelined, sharded_losses, sharded_logits) in enumerate(
        workers.run(2, train_sharded, config)
    ):
        assert pipelined == collections
        torch.testing.assert_close(sharded_losses, losses[rank], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sharded_logits, logits[rank], rtol=1e-4, atol=1e-5)
