"""Tables and batches small enough for every check, awkward enough to find mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import (
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Shape = Literal["single", "ragged", "empty", "full_bags"]
"""Bags of one id; of 0 to 4; all empty; of 2 each."""

INIT = 0.1
"""Weights of the tables here start uniform in [-INIT, INIT]."""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """One logical table, to be declared as a bag table or an unpooled one.

    Args:
        name: table name.
        rows: `num_embeddings`.
        dim: `embedding_dim`.
        features: the features looked up in it.
        mean: whether bags are averaged.
    """

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    mean: bool = False

    def bag(self) -> EmbeddingBagConfig:
        """As a table of a pooled collection."""
        return EmbeddingBagConfig(
            name=self.name,
            num_embeddings=self.rows,
            embedding_dim=self.dim,
            feature_names=list(self.features),
            pooling=PoolingType.MEAN if self.mean else PoolingType.SUM,
            weight_init_min=-INIT,
            weight_init_max=INIT,
        )

    def unpooled(self) -> EmbeddingConfig:
        """As a table of an unpooled collection."""
        return EmbeddingConfig(
            name=self.name,
            num_embeddings=self.rows,
            embedding_dim=self.dim,
            feature_names=list(self.features),
            weight_init_min=-INIT,
            weight_init_max=INIT,
        )


def plain_tables(dim: int = 8, rows: Sequence[int] = (60, 90, 75)) -> list[Declared]:
    """One feature a table, summed bags."""
    return [
        Declared(name=f"t{n}", rows=count, dim=dim, features=(f"f{n}",))
        for n, count in enumerate(rows)
    ]


def awkward_tables(dims: Sequence[int] = (8, 4, 16)) -> list[Declared]:
    """Two features in one table, a feature in two tables, sums and means, several widths."""
    return [
        Declared(name="t0", rows=60, dim=dims[0], features=("f0", "f1")),
        Declared(name="t1", rows=90, dim=dims[1], features=("f2",), mean=True),
        Declared(name="t2", rows=75, dim=dims[2], features=("f1",)),
    ]


def feature_rows(tables: Sequence[Declared]) -> dict[str, int]:
    """For each feature, the ids that are in range of every table that looks it up."""
    limits: dict[str, int] = {}
    for table in tables:
        for feature in table.features:
            limits[feature] = min(table.rows, limits.get(feature, table.rows))
    return limits


def batch_of(
    bags: Mapping[str, Sequence[Sequence[int]]],
    *,
    weights: Mapping[str, Sequence[Sequence[float]]] | None = None,
    dtype: torch.dtype = torch.int64,
) -> KeyedJaggedTensor:
    """A batch written out: for each feature its bags of ids, and of weights."""
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor([id_ for f in bags.values() for bag in f for id_ in bag], dtype=dtype),
        lengths=torch.tensor([len(bag) for f in bags.values() for bag in f], dtype=torch.int32),
        weights=None
        if weights is None
        else torch.tensor([w for f in bags for bag in weights[f] for w in bag]),
    )


def random_batch(
    tables: Sequence[Declared],
    *,
    seed: int,
    batch_size: int = 6,
    shape: Shape = "ragged",
    weighted: bool = False,
    dtype: torch.dtype = torch.int64,
) -> KeyedJaggedTensor:
    """Uniform ids in range for every feature of the tables; the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    values: list[Tensor] = []
    lengths: list[Tensor] = []
    limits = feature_rows(tables)
    for limit in limits.values():
        length = {
            "single": torch.ones(batch_size, dtype=torch.int32),
            "ragged": torch.randint(0, 5, (batch_size,), generator=random, dtype=torch.int32),
            "empty": torch.zeros(batch_size, dtype=torch.int32),
            "full_bags": torch.full((batch_size,), 2, dtype=torch.int32),
        }[shape]
        lengths.append(length)
        count = int(length.sum())
        values.append(torch.randint(0, limit, (count,), generator=random, dtype=dtype))
    ids = torch.cat(values)
    return KeyedJaggedTensor(
        keys=list(limits),
        values=ids,
        lengths=torch.cat(lengths),
        weights=torch.rand(ids.numel(), generator=random) + 0.5 if weighted else None,
        stride=batch_size,
    )


def joined(batches: Sequence[KeyedJaggedTensor]) -> KeyedJaggedTensor:
    """One batch of all the batches' rows, in order: what several ranks see together."""
    keys = batches[0].keys()
    parts = [batch.to_dict() for batch in batches]
    values = [part[key].values() for key in keys for part in parts]
    lengths = [part[key].lengths() for key in keys for part in parts]
    weighted = batches[0].weights_or_none() is not None
    weights = [part[key].weights() for key in keys for part in parts] if weighted else None
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.cat(values),
        lengths=torch.cat(lengths),
        weights=None if weights is None else torch.cat(weights),
        stride=sum(batch.stride() for batch in batches),
    )
