"""Embeddings of single ids, all features of a method at once: no bags, no other method."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.errors import ArtefactError
from embcomp.layers.lookup_context import LookupContext
from embcomp.serving.modules import ServingEmbeddingBagCollection, ServingEmbeddingCollection
from embcomp.serving.serving_rows import TorchRows


class SingleIds(nn.Module):
    """A serving collection's methods, each for a rectangle of ids.

    Args:
        serving: a collection that was loaded with `rows="torch"`.
    """

    def __init__(self, serving: ServingEmbeddingBagCollection | ServingEmbeddingCollection) -> None:
        super().__init__()
        self._groups = serving.groups
        self.routes = nn.ModuleList(group.backend.route for group in self._groups)
        self.combines = nn.ModuleList(group.backend.combine for group in self._groups)
        self.rows, self.unpooled_rows = _torch(serving.rows), _torch(serving.unpooled_rows)

    def forward(self, index: int, ids: Tensor) -> Tensor:
        """Look ids up.

        Args:
            index: which method.
            ids: (its features, N) int64.

        Returns:
            (N, sum of its embedding_dims) float32.
        """
        group, count = self._groups[index], ids.shape[1]
        features = KeyedJaggedTensor(
            keys=[instance.key for instance in group.instances],
            values=ids.reshape(-1),
            lengths=torch.ones_like(ids, dtype=torch.int32).reshape(-1),
            stride=count,
            length_per_key=[count] * len(group.instances),
        )
        physical = self.routes[index](features)
        keys = physical.keys()
        found: dict[str, Tensor] = {}
        if keys:
            held = self.unpooled_rows if group.unpooled else self.rows
            assert held is not None
            each = physical.values().view(len(keys), count, group.backend.ids_per_value)
            found = held.rectangle(keys, each, skips=group.backend.skips_negative_ids)
        parts = [found[key] for key in group.backend.keys]
        rows = torch.cat(parts, dim=1) if parts else torch.zeros(count, 0, device=ids.device)
        combine = self.combines[index]
        if group.backend.needs_context:
            return combine(rows, LookupContext(features, slice(0, len(group.instances)), count))
        return combine(rows)


def _torch(rows: nn.Module | None) -> TorchRows | None:
    if rows is None or isinstance(rows, TorchRows):
        return rows
    raise ArtefactError('load the artefact with rows="torch" for this')
