"""The smallest models that read a collection's output non-linearly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor
from typing_extensions import override

from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.data_pipelines.loader.batch import Batch
from embcomp.layers.learned_buffers import AddPenalty


class PooledHead(nn.Module):
    """Two layers over all columns.

    Args:
        width: sum of the embeddings' widths.
        device: where to build.
    """

    def __init__(self, width: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 5, device=device)
        self.out = nn.Linear(5, 1, device=device)

    @override
    def forward(self, embeddings: KeyedTensor) -> Tensor:
        # (B, width) -> (B,); scaled, so that small embeddings make large enough gradients
        hidden = torch.tanh(self.hidden(10 * embeddings.values()))
        return self.out(hidden).squeeze(1)


class UnpooledHead(nn.Module):
    """Scores each id's embedding and sums the scores of a row.

    Args:
        dim: width of every embedding.
        device: where to build.
    """

    def __init__(self, dim: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, 5, device=device)
        self.out = nn.Linear(5, 1, device=device)

    @override
    def forward(self, embeddings: dict[str, JaggedTensor]) -> Tensor:
        total: Tensor | None = None
        for key in list(embeddings.keys()):
            jagged = embeddings[key]
            scores = self.out(torch.tanh(self.hidden(10 * jagged.values()))).squeeze(1)  # (N,)
            lengths = jagged.lengths()
            rows = torch.arange(len(lengths)).repeat_interleave(lengths)
            summed = scores.new_zeros(len(lengths)).index_add(0, rows, scores)
            total = summed if total is None else total + summed
        assert total is not None
        return total


class Scorer(nn.Module):
    """Tables and a head: `Batch` -> (loss, logits (B,)), as TorchRec's pipelines want it."""

    def __init__(
        self,
        tables: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.tables = tables
        self.head = head
        self.add_penalty = AddPenalty(tables)

    @override
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.head(self.tables(batch.sparse))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return self.add_penalty(loss), logits
