"""What a check needs to know of a method, and the few lines that all checks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.backends.base import BackendConfig
from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.testing.check_data import INIT, Declared

Collection = CompressedEmbeddingBagCollection | CompressedEmbeddingCollection


@dataclass(frozen=True, kw_only=True)
class BackendCase:
    """A configuration to be checked, and what its method promises.

    Args:
        config: with a size, for tables of 60 to 90 rows; not a budget.
        takes_any_id: ids outside `[0, num_embeddings)` are hashed; otherwise they are refused.
        injective: different ids never have equal embeddings.
        init_std: standard deviation of fresh embeddings; that of the full table if not given.
    """

    config: BackendConfig
    takes_any_id: bool = False
    injective: bool = False
    init_std: float = INIT / 3**0.5

    @property
    def label(self) -> str:
        """For test ids: the method and the settings that are not its defaults."""
        text = str(self.config)
        for noise in ("'", " ", "budget=None,"):
            text = text.replace(noise, "")
        return text


def expect(condition: bool, message: str) -> None:
    """Fail a check, also where asserts are compiled away."""
    if not condition:
        raise AssertionError(message)


def pooled(
    case: BackendCase,
    tables: Sequence[Declared],
    *,
    is_weighted: bool = False,
    seed: int = 0,
    device: torch.device | None = None,
) -> CompressedEmbeddingBagCollection:
    """The case's pooled collection in eval mode, its weights drawn with a seed."""
    torch.manual_seed(seed)
    return CompressedEmbeddingBagCollection(
        [table.bag() for table in tables], case.config, is_weighted=is_weighted, device=device
    ).eval()


def unpooled(
    case: BackendCase, tables: Sequence[Declared], *, seed: int = 0, need_indices: bool = False
) -> CompressedEmbeddingCollection:
    """The case's unpooled collection in eval mode, its weights drawn with a seed."""
    torch.manual_seed(seed)
    return CompressedEmbeddingCollection(
        [table.unpooled() for table in tables], case.config, need_indices=need_indices
    ).eval()


def learning(collection: Collection) -> Collection:
    """A collection in training mode; rows that methods update themselves are told by a fused SGD how fast.

    Args:
        collection: not sharded.
    """
    packed = {table.name for table in collection.physical_tables if table.is_packed}
    rows = [p for name, p in collection.named_parameters() if name.split(".")[-2] in packed]
    if rows:
        apply_optimizer_in_backward(torch.optim.SGD, rows, {"lr": 0.1})
    return collection.train()


def output_keys(tables: Sequence[Declared]) -> dict[str, tuple[Declared, str]]:
    """What a collection returns, in order: for each output key its table and feature."""
    features = [feature for table in tables for feature in table.features]
    return {
        feature if features.count(feature) == 1 else f"{feature}@{table.name}": (table, feature)
        for table in tables
        for feature in table.features
    }


def embed_ids(
    collection: CompressedEmbeddingBagCollection, tables: Sequence[Declared]
) -> dict[str, Tensor]:
    """Every id's embedding under every output key, looked up alone: (num_embeddings, dim)."""
    found = {}
    for key, (table, feature) in output_keys(tables).items():
        ids = torch.arange(table.rows)
        length = {name: int(name == feature) for t in tables for name in t.features}
        batch = KeyedJaggedTensor(
            keys=list(length),
            values=ids,
            lengths=torch.tensor(list(length.values())).repeat_interleave(table.rows),
            weights=torch.ones(table.rows) if collection.is_weighted() else None,
            stride=table.rows,
        )
        if all(table.rows <= t.rows for t in tables if feature in t.features):
            found[key] = collection(batch)[key].detach()
    return found
