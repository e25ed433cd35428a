"""DNIS: columns learnt by frequency block (AutoSrh), pruned to a budget.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.backends.dnis.config import (
        DNIS as DNIS,
        Structure as Structure,
    )

_HOMES = dict.fromkeys(
    (
        "DNIS",
        "Structure",
    ),
    "embcomp.backends.dnis.config",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
