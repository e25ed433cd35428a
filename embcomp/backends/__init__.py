"""The compression methods, one file each."""

from __future__ import annotations

from embcomp.backends.base import BackendConfig
from embcomp.backends.blocks import Blocks
from embcomp.backends.codebooks.coded import Coded
from embcomp.backends.codebooks.low_rank import LowRank
from embcomp.backends.codebooks.lr2vq import LR2VQ
from embcomp.backends.codebooks.pq import PQ
from embcomp.backends.dnis.config import DNIS
from embcomp.backends.dnis.search import DNISSearch
from embcomp.backends.full import Full
from embcomp.backends.hash import Hash
from embcomp.backends.low_dim import LowDim
from embcomp.backends.qr import QR
from embcomp.backends.sparse import Sparse
from embcomp.backends.unified import Unified
from embcomp.backends.widths.matryoshka import Matryoshka
from embcomp.backends.widths.optembed import OptEmbed

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
