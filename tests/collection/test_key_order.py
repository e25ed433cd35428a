"""Look-ups keep the order in which tables were declared, so that a step permutes neither ids nor rows."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp import QR, BackendConfig, CompressedEmbeddingBagCollection, Full, Hash, LowDim, Unified

NAMES = ["C10", "C2", "C1"]  # not the order of text

METHODS = [
    Full(),
    Hash(num_buckets=5, collisionless=0),
    QR(divisor=4),
    QR(divisor=4, combine="add"),
    Unified(num_buckets=7),
    LowDim(width=2),
]


class _Permutations(TorchDispatchMode):
    """Operations that pick columns of what was looked up, or put ids in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), str(func)
        picked = "index_select" in name and args[0].is_floating_point()
        if "permute_2D" in name or (picked and out.shape == args[0].shape):
            self.found.append(name)
        return out


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}")
def test_no_key_is_permuted(method: BackendConfig) -> None:
    tables = [
        EmbeddingBagConfig(name=n, embedding_dim=4, num_embeddings=20, feature_names=[f"f-{n}"])
        for n in NAMES
    ]
    collection = CompressedEmbeddingBagCollection(tables, method)
    batch = KeyedJaggedTensor(
        keys=[f"f-{n}" for n in NAMES],
        values=torch.arange(6),
        lengths=torch.ones(6, dtype=torch.int32),
    )
    collection(batch)
    with _Permutations() as permutations:
        out = collection(batch)
    assert out.keys() == batch.keys()
    assert permutations.found == []
