"""Units of tables, their options in bytes, and repair to the budget.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.search.space.space import (
        Candidate as Candidate,
        Space as Space,
        build_space as build_space,
    )

_HOMES = dict.fromkeys(
    (
        "Candidate",
        "Space",
        "build_space",
    ),
    "embcomp.search.space.space",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
