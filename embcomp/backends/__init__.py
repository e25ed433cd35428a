"""The compression methods, one file each."""

from __future__ import annotations

from embcomp.backends.base import BackendConfig
from embcomp.backends.blocks import Blocks
from embcomp.backends.coded import Coded
from embcomp.backends.dnis import DNIS
from embcomp.backends.dnis_search import DNISSearch
from embcomp.backends.full import Full
from embcomp.backends.hash import Hash
from embcomp.backends.low_dim import LowDim
from embcomp.backends.low_rank import LowRank
from embcomp.backends.lr2vq import LR2VQ
from embcomp.backends.matryoshka import Matryoshka
from embcomp.backends.optembed import OptEmbed
from embcomp.backends.pq import PQ
from embcomp.backends.qr import QR
from embcomp.backends.sparse import Sparse
from embcomp.backends.unified import Unified

_CONFIGS: tuple[type[BackendConfig], ...] = (
    Blocks,
    Coded,
    DNIS,
    DNISSearch,
    Full,
    Hash,
    LowDim,
    Matryoshka,
    OptEmbed,
    LowRank,
    LR2VQ,
    PQ,
    QR,
    Sparse,
    Unified,
)

BACKENDS: dict[str, type[BackendConfig]] = {config.name: config for config in _CONFIGS}
"""Every method by the name that configuration files use."""

__all__ = [
    "BACKENDS",
    "DNIS",
    "LR2VQ",
    "PQ",
    "QR",
    "Blocks",
    "Coded",
    "DNISSearch",
    "Full",
    "Hash",
    "LowDim",
    "LowRank",
    "Matryoshka",
    "OptEmbed",
    "Sparse",
    "Unified",
]
