"""The compression methods, one file each."""

from __future__ import annotations

from embcomp.backend import BackendConfig
from embcomp.backends.blocks import Blocks
from embcomp.backends.coded import Coded
from embcomp.backends.full import Full
from embcomp.backends.hash import Hash
from embcomp.backends.low_dim import LowDim
from embcomp.backends.low_rank import LowRank
from embcomp.backends.lr2vq import LR2VQ
from embcomp.backends.pq import PQ
from embcomp.backends.qr import QR
from embcomp.backends.unified import Unified

_CONFIGS: tuple[type[BackendConfig], ...] = (
    Blocks,
    Coded,
    Full,
    Hash,
    LowDim,
    LowRank,
    LR2VQ,
    PQ,
    QR,
    Unified,
)

BACKENDS: dict[str, type[BackendConfig]] = {config.name: config for config in _CONFIGS}
"""Every method by the name that configuration files use."""

__all__ = [
    "BACKENDS",
    "LR2VQ",
    "PQ",
    "QR",
    "Blocks",
    "Coded",
    "Full",
    "Hash",
    "LowDim",
    "LowRank",
    "Unified",
]
