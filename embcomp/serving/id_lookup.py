"""Embeddings of single ids, all features of a method at once: no bags, no other method."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.collection.groups import Group
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

    @property
    def groups(self) -> list[Group]:
        """The methods, in order."""
        return self._groups

    def forward(self, index: int, ids: Tensor) -> Tensor:
        """Look ids up.

        Args:
            index: which method.
            ids: (its features, N) int64.

        Returns:
            (N, sum of its embedding_dims) float32.
        """
        keys, each = self.physical(index, ids)
        found: dict[str, Tensor] = {}
        if keys:
            group = self._groups[index]
            held = self.unpooled_rows if group.unpooled else self.rows
            assert held is not None
            found = held.rectangle(keys, each, skips=group.backend.skips_negative_ids)
        return self.combined(index, found, ids)

    def physical(self, index: int, ids: Tensor) -> tuple[list[str], Tensor]:
        """Which physical rows a method looks up for ids.

        Args:
            index: which method.
            ids: (its features, N) int64.

        Returns:
            The look-ups, and their rows' ids: (look-ups, N, ids per value) int64.
        """
        backend = self._groups[index].backend
        physical = self.routes[index](self._features(index, ids))
        keys = list(physical.keys())
        if not keys:
            return keys, ids.new_zeros(0, ids.shape[1], backend.ids_per_value)
        return keys, physical.values().view(len(keys), ids.shape[1], backend.ids_per_value)

    def combined(self, index: int, found: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """The embeddings that a method makes of physical rows.

        Args:
            index: which method.
            found: for each of its look-ups, (N, dim) rows, those of a value summed.
            ids: as they were looked up.

        Returns:
            (N, sum of its embedding_dims) float32.
        """
        group, count = self._groups[index], ids.shape[1]
        parts = [found[key] for key in group.backend.keys]
        rows = torch.cat(parts, dim=1) if parts else torch.zeros(count, 0, device=ids.device)
        combine = self.combines[index]
        if group.backend.needs_context:
            features = self._features(index, ids)
            return combine(rows, LookupContext(features, slice(0, len(group.instances)), count))
        return combine(rows)

    def _features(self, index: int, ids: Tensor) -> KeyedJaggedTensor:
        group, count = self._groups[index], ids.shape[1]
        return KeyedJaggedTensor(
            keys=[instance.key for instance in group.instances],
            values=ids.reshape(-1),
            lengths=torch.ones_like(ids, dtype=torch.int32).reshape(-1),
            stride=count,
            length_per_key=[count] * len(group.instances),
        )


def _torch(rows: nn.Module | None) -> TorchRows | None:
    if rows is None or isinstance(rows, TorchRows):
        return rows
    raise ArtefactError('load the artefact with rows="torch" for this')
