"""Scores one split on all ranks; exact, because every prediction is gathered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.data_pipelines.loader.batch import Batch
from embcomp.data_pipelines.schema import UNSEEN_ID
from embcomp.io.atomic_files import atomic_path
from embcomp.training.distributed.process import Process
from embcomp.training.reporting.metrics import Metrics, compute_metrics


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: metrics of the split.
        unseen_rate: share of ids that are the unseen id, over all features.
        unseen_rate_by_feature: the same for each feature.
        weighted: metrics in which each row counts by its weight; None where rows have none.
    """

    metrics: Metrics
    unseen_rate: float
    unseen_rate_by_feature: dict[str, float]
    weighted: Metrics | None = None


@torch.no_grad()
def evaluate_batches(
    task: nn.Module, batches: Iterable[Batch], process: Process, *, keep: Path | None = None
) -> Evaluation:
    """Evaluate a sharded `TrainTask`; all ranks call it and all get the same result.

    Args:
        task: returns loss and logits of a batch.
        batches: this rank's share of the split, as many batches as on the other ranks.
        process: the process group.
        keep: a file for what was gathered, `logits` and `labels` (N,) float32; None keeps none.
    """
    was_training = task.training
    task.eval()
    logits, labels, groups, weights = [], [], [], []
    unseen: Tensor | None = None
    keys: list[str] = []
    for batch in batches:
        on_device = batch.to(process.device, non_blocking=True)
        scores = task(on_device)[1][1].float()
        rows = len(scores) if batch.num_valid is None else batch.num_valid
        logits.append(scores[:rows].cpu())
        labels.append(batch.labels[:rows].cpu())
        if batch.groups is not None:
            groups.append(batch.groups[:rows].cpu())
        if batch.weights is not None:
            weights.append(batch.weights[:rows].cpu())
        counts = count_unseen(batch.sparse, rows)
        unseen, keys = counts if unseen is None else unseen + counts, batch.sparse.keys()
    task.train(was_training)
    everything = _gather_columns([logits, labels, groups, weights], process)
    if unseen is not None:
        unseen = _sum_over_ranks(unseen.to(process.device)).cpu()
    if keep is not None and process.is_main:
        keep_scores(keep, everything[0], everything[1])
    result = [_summarize(everything, unseen, keys)] if process.is_main else [None]
    dist.broadcast_object_list(result, src=0, device=process.device)
    evaluation = result[0]
    assert evaluation is not None
    return evaluation


def keep_scores(path: Path, logits: np.ndarray, labels: np.ndarray) -> None:
    """Write scores and labels (N,) of a split's rows, in the order of the ranks that scored them."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, logits=logits.astype(np.float32), labels=labels.astype(np.float32))


def count_unseen(sparse: KeyedJaggedTensor, rows: int) -> Tensor:
    """(F, 2) int64: the unseen ids and all ids of each feature in a batch's first rows."""
    batch, features = sparse.stride(), len(sparse.keys())
    offsets = sparse.offsets().long().cpu()
    first = offsets[torch.arange(features) * batch]
    last = offsets[torch.arange(features) * batch + rows]
    unseen = (sparse.values().cpu() == UNSEEN_ID).long()
    before = torch.cat((torch.zeros(1, dtype=torch.int64), unseen.cumsum(0)))
    return torch.stack((before[last] - before[first], last - first), dim=1)


def _summarize(columns: list[np.ndarray], unseen: Tensor | None, keys: list[str]) -> Evaluation:
    logits, labels, ids, weights = columns
    groups = ids.astype(np.int64) if len(ids) else None
    counts = np.zeros((0, 2)) if unseen is None else unseen.numpy()
    total = counts.sum(axis=0)
    return Evaluation(
        metrics=compute_metrics(logits, labels, groups),
        weighted=compute_metrics(logits, labels, groups, weights) if len(weights) else None,
        unseen_rate=_share(total[0], total[1]),
        unseen_rate_by_feature={key: _share(*row) for key, row in zip(keys, counts)},
    )


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else 0.0


def _sum_over_ranks(counts: Tensor) -> Tensor:
    dist.all_reduce(counts)
    return counts


def _gather_columns(columns: list[list[Tensor]], process: Process) -> list[np.ndarray]:
    """Each column's values of all ranks, one rank after another; only rank 0 gets them."""
    return [
        np.concatenate([part.numpy() for part in _gather(column, process)]) for column in columns
    ]


def _gather(parts: list[Tensor], process: Process) -> list[Tensor]:
    mine = torch.cat(parts) if parts else torch.zeros(0)
    if process.world_size == 1:
        return [mine]
    sizes = torch.zeros(process.world_size, dtype=torch.int64, device=process.device)
    sizes[process.rank] = len(mine)
    dist.all_reduce(sizes)
    longest = int(sizes.max())
    padded = torch.zeros(longest, dtype=mine.dtype, device=process.device)
    padded[: len(mine)] = mine
    received = [torch.empty_like(padded) for _ in sizes] if process.is_main else None
    dist.gather(padded, received, dst=0)
    if received is None:
        return [mine]
    return [part[:size].cpu() for part, size in zip(received, sizes.tolist())]
