"""Compressed embedding tables for TorchRec: one table interface, a byte budget, sharded training.

Public names are imported on first use: importing torchrec takes seconds, and `embcomp doctor` must
answer even where that import fails.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embcomp.backends import (
        BACKENDS,
        DNIS,
        LR2VQ,
        PQ,
        QR,
        Blocks,
        Coded,
        DNISSearch,
        Full,
        Hash,
        LowDim,
        LowRank,
        Matryoshka,
        OptEmbed,
        Sparse,
        Unified,
    )
    from embcomp.backends.base import BackendConfig
    from embcomp.collection.collection import (
        CompressedEmbeddingBagCollection,
        CompressedEmbeddingCollection,
    )
    from embcomp.collection.plan import Plan
    from embcomp.errors import (
        ArtefactError,
        BudgetError,
        CheckpointError,
        ConfigError,
        DataError,
        EmbcompError,
    )
    from embcomp.serving.artefact_loading import load
    from embcomp.serving.artefact_saving import save

__all__ = [
    "BACKENDS",
    "DNIS",
    "LR2VQ",
    "PQ",
    "QR",
    "ArtefactError",
    "BackendConfig",
    "Blocks",
    "BudgetError",
    "CheckpointError",
    "Coded",
    "CompressedEmbeddingBagCollection",
    "CompressedEmbeddingCollection",
    "ConfigError",
    "DNISSearch",
    "DataError",
    "EmbcompError",
    "Full",
    "Hash",
    "LowDim",
    "LowRank",
    "Matryoshka",
    "OptEmbed",
    "Plan",
    "Sparse",
    "Unified",
    "load",
    "save",
]

_HOMES = {
    "ArtefactError": "embcomp.errors",
    "BACKENDS": "embcomp.backends",
    "BackendConfig": "embcomp.backends.base",
    "Blocks": "embcomp.backends",
    "BudgetError": "embcomp.errors",
    "CheckpointError": "embcomp.errors",
    "Coded": "embcomp.backends",
    "CompressedEmbeddingBagCollection": "embcomp.collection.collection",
    "CompressedEmbeddingCollection": "embcomp.collection.collection",
    "ConfigError": "embcomp.errors",
    "DNIS": "embcomp.backends",
    "DNISSearch": "embcomp.backends",
    "DataError": "embcomp.errors",
    "EmbcompError": "embcomp.errors",
    "Full": "embcomp.backends",
    "Hash": "embcomp.backends",
    "LR2VQ": "embcomp.backends",
    "LowDim": "embcomp.backends",
    "LowRank": "embcomp.backends",
    "PQ": "embcomp.backends",
    "Matryoshka": "embcomp.backends",
    "OptEmbed": "embcomp.backends",
    "Plan": "embcomp.collection.plan",
    "QR": "embcomp.backends",
    "Sparse": "embcomp.backends",
    "Unified": "embcomp.backends",
    "load": "embcomp.serving.artefact_loading",
    "save": "embcomp.serving.artefact_saving",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'embcomp' has no attribute {name!r}; it has {__all__}")
    module = import_module(_HOMES[name])
    value = vars(module)[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
