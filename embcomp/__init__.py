"""Compressed embedding tables for TorchRec: one table interface, a byte budget, sharded training.

Public names are imported on first use: importing torchrec takes seconds, and `embcomp doctor` must
answer even where that import fails.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see; at run time __getattr__ finds them
    from embcomp.backend import BackendConfig as BackendConfig
    from embcomp.backends import BACKENDS as BACKENDS
    from embcomp.backends import QR as QR
    from embcomp.backends import Full as Full
    from embcomp.backends import Hash as Hash
    from embcomp.backends import Unified as Unified
    from embcomp.collection import (
        CompressedEmbeddingBagCollection as CompressedEmbeddingBagCollection,
    )
    from embcomp.collection import CompressedEmbeddingCollection as CompressedEmbeddingCollection
    from embcomp.errors import BudgetError as BudgetError
    from embcomp.errors import CheckpointError as CheckpointError
    from embcomp.errors import ConfigError as ConfigError
    from embcomp.errors import DataError as DataError
    from embcomp.errors import EmbcompError as EmbcompError
    from embcomp.plan import Plan as Plan

_HOMES = {
    "BACKENDS": "embcomp.backends",
    "BackendConfig": "embcomp.backend",
    "BudgetError": "embcomp.errors",
    "CheckpointError": "embcomp.errors",
    "CompressedEmbeddingBagCollection": "embcomp.collection",
    "CompressedEmbeddingCollection": "embcomp.collection",
    "ConfigError": "embcomp.errors",
    "DataError": "embcomp.errors",
    "EmbcompError": "embcomp.errors",
    "Full": "embcomp.backends",
    "Hash": "embcomp.backends",
    "Plan": "embcomp.plan",
    "QR": "embcomp.backends",
    "Unified": "embcomp.backends",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'embcomp' has no attribute {name!r}; it has {__all__}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
