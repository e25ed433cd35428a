"""Batch-norm statistics for a model whose embeddings are not the ones that it was trained with.

A supernet keeps running means over all structures that it was trained with, which are those of none.
So they are taken anew for each candidate, as Guo et al., "Single Path One-Shot Neural Architecture
Search", ECCV 2020, do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from embcomp.data_pipelines.loader.batch import Batch
from embcomp.training.distributed.process import Process


def running_norms(model: nn.Module) -> list[_BatchNorm]:
    """The model's batch norms that keep running statistics."""
    found = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in found if norm.track_running_stats]


@torch.no_grad()
def refit(
    task: nn.Module, norms: Sequence[_BatchNorm], batches: Sequence[Batch], process: Process
) -> None:
    """Set running statistics to the means over some batches, all else in evaluation.

    Args:
        task: the model that the norms are in.
        norms: of the model.
        batches: of which those as large as the first count; of labels nothing is used.
        process: the process group.
    """
    momenta = [norm.momentum for norm in norms]
    task.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    for batch in batches:
        if len(batch.labels) == len(batches[0].labels):
            task(batch.to(process.device))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.eval()
