"""Compressed tables where torch's own `nn.Embedding` and `nn.EmbeddingBag` stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.errors import ConfigError

FEATURE = "ids"
"""The only feature of such a table."""


class CompressedEmbedding(nn.Module):
    """One compressed table, called with ids of any shape as `nn.Embedding` is.

    Args:
        tables: a collection of this table alone.
        table: its name.
        dtype: of the embeddings.
        padding_idx: the id that gives zeros; None for none.
    """

    def __init__(
        self,
        tables: CompressedEmbeddingCollection,
        table: str,
        dtype: torch.dtype,
        padding_idx: int | None,
    ) -> None:
        super().__init__()
        self.tables = tables
        self._table, self._dtype, self._padding = table, dtype, padding_idx
        spec = tables.plan.tables[0]
        self.num_embeddings, self.embedding_dim = spec.num_embeddings, spec.embedding_dim

    @override
    def forward(self, ids: Tensor) -> Tensor:
        """Look up: (*ids.shape, embedding_dim)."""
        flat = ids.reshape(-1)
        batch = KeyedJaggedTensor(
            keys=[FEATURE],
            values=flat,
            lengths=torch.ones_like(flat, dtype=torch.int32),
            length_per_key=[len(flat)],
            stride=len(flat),
        )
        found = self.tables(batch)[FEATURE].values()
        if self._padding is not None:
            found = found * (flat != self._padding).unsqueeze(1)
        return cast(Tensor, found.to(self._dtype).reshape(*ids.shape, self.embedding_dim))


class CompressedEmbeddingBag(nn.Module):
    """One compressed table, called with bags as `nn.EmbeddingBag` is.

    Args:
        tables: a collection of this table alone.
        bag: the module whose place it takes.
    """

    def __init__(self, tables: CompressedEmbeddingBagCollection, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.tables = tables
        self._dtype, self._padding = bag.weight.dtype, bag.padding_idx
        self._includes_last, self._is_mean = bag.include_last_offset, bag.mode == "mean"
        self.num_embeddings, self.embedding_dim = bag.num_embeddings, bag.embedding_dim

    @override
    def forward(
        self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Look up and pool: (B, embedding_dim); arguments as of `nn.EmbeddingBag`."""
        flat = ids.reshape(-1)
        lengths = self._lengths(ids, offsets)
        weights = torch.ones(len(flat), device=flat.device)
        if per_sample_weights is not None:
            weights = per_sample_weights.reshape(-1).float()
        if self._padding is not None:
            kept = flat != self._padding
            bags = torch.arange(len(lengths), device=flat.device).repeat_interleave(lengths)
            lengths = torch.bincount(bags[kept], minlength=len(lengths))
            flat, weights = flat[kept], weights[kept]
        batch = KeyedJaggedTensor(
            keys=[FEATURE],
            values=flat,
            lengths=lengths.to(torch.int32),
            weights=weights,
            length_per_key=[len(flat)],
            stride=len(lengths),
        )
        return cast(Tensor, self.tables(batch)[FEATURE].to(self._dtype))

    def _lengths(self, ids: Tensor, offsets: Tensor | None) -> Tensor:
        """(B,) ids of each bag."""
        if ids.dim() == 2:
            return torch.full((ids.shape[0],), ids.shape[1], device=ids.device)
        if offsets is None:
            raise ConfigError("ids of one axis need the offsets of their bags")
        if self._includes_last:
            return offsets.diff()
        return torch.cat([offsets, offsets.new_tensor([len(ids)])]).diff()


def check_embedding(path: str, module: nn.Embedding | nn.EmbeddingBag) -> None:
    """Refuse what a compressed table cannot stand for.

    Raises:
        ConfigError: names the module and the setting.
    """
    problem = None
    if module.max_norm is not None:
        problem = "max_norm rescales rows as they are looked up"
    elif isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        problem = "mode='max' has no sum of rows"
    elif module.scale_grad_by_freq:
        problem = "scale_grad_by_freq scales gradients, which fused optimizers do not"
    if problem is not None:
        raise ConfigError(
            f"{path}: {type(module).__name__}: {problem}; leave it out with `include`, or turn it off"
        )


def config_of(name: str, module: nn.Embedding | nn.EmbeddingBag) -> EmbeddingConfig:
    """TorchRec's description of a module's table."""
    kind: Callable[..., EmbeddingConfig] = EmbeddingConfig
    settings = {
        "name": name,
        "num_embeddings": module.num_embeddings,
        "embedding_dim": module.embedding_dim,
        "feature_names": [FEATURE],
    }
    if isinstance(module, nn.EmbeddingBag):
        pooling = PoolingType.MEAN if module.mode == "mean" else PoolingType.SUM
        return cast(EmbeddingConfig, EmbeddingBagConfig(**settings, pooling=pooling))
    return kind(**settings)
