"""The two collections, and the plan that says which method holds which table.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.collection.collection import (
        AnyPlan as AnyPlan,
        CompressedEmbeddingBagCollection as CompressedEmbeddingBagCollection,
        CompressedEmbeddingCollection as CompressedEmbeddingCollection,
        build_groups as build_groups,
    )

_HOMES = dict.fromkeys(
    (
        "AnyPlan",
        "CompressedEmbeddingBagCollection",
        "CompressedEmbeddingCollection",
        "build_groups",
    ),
    "embcomp.collection.collection",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
