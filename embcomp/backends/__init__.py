"""The compression methods, one file each.

Whatever method lies in a module here is found, and so is what other packages announce. The names
below are for type checkers.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from embcomp.backends.discovery import ENTRY_POINTS, Methods, methods_of

if TYPE_CHECKING:
    from embcomp.backends.adapt import Adapt as Adapt
    from embcomp.backends.autodim import AutoDim as AutoDim
    from embcomp.backends.blocks import Blocks as Blocks
    from embcomp.backends.cafe.cafe import Cafe as Cafe
    from embcomp.backends.cce import CCE as CCE
    from embcomp.backends.codebooks.coded import Coded as Coded
    from embcomp.backends.codebooks.low_rank import LowRank as LowRank
    from embcomp.backends.codebooks.lr2vq import LR2VQ as LR2VQ
    from embcomp.backends.codebooks.mgqe import MGQE as MGQE
    from embcomp.backends.codebooks.pq import PQ as PQ
    from embcomp.backends.dedup import Dedup as Dedup
    from embcomp.backends.deeplight import DeepLight as DeepLight
    from embcomp.backends.dhe import DHE as DHE
    from embcomp.backends.dnis.config import DNIS as DNIS
    from embcomp.backends.dnis.search import DNISSearch as DNISSearch
    from embcomp.backends.double_hash import DoubleHash as DoubleHash
    from embcomp.backends.full import Full as Full
    from embcomp.backends.hash import Hash as Hash
    from embcomp.backends.integer_rows.integer_rows import (
        ALPT as ALPT,
        Int8 as Int8,
        Int16 as Int16,
    )
    from embcomp.backends.low_dim import LowDim as LowDim
    from embcomp.backends.mapped.mapped import Mapped as Mapped
    from embcomp.backends.mde import MDE as MDE
    from embcomp.backends.mlet import MLET as MLET
    from embcomp.backends.pep import PEP as PEP
    from embcomp.backends.qr import QR as QR
    from embcomp.backends.robe import Robe as Robe
    from embcomp.backends.sparse import Sparse as Sparse
    from embcomp.backends.tt import TT as TT
    from embcomp.backends.typed_blocks import TypedBlocks as TypedBlocks
    from embcomp.backends.unified import Unified as Unified
    from embcomp.backends.widths.matryoshka import Matryoshka as Matryoshka
    from embcomp.backends.widths.optembed import OptEmbed as OptEmbed

_OURS = methods_of(sys.modules[__name__])
_BY_CLASS = {method.__name__: method for method in _OURS}
globals().update(_BY_CLASS)

BACKENDS = Methods(_OURS, group=ENTRY_POINTS)
"""Every method by the name that configuration files use."""

register = BACKENDS.register

__all__ = list(_BY_CLASS)
__all__ += ["BACKENDS", "register"]
