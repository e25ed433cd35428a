"""The two collections, and the plan that says which method holds which table.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.collection.assembled import build_groups as build_groups
    from embcomp.collection.collection import (
        AnyPlan as AnyPlan,
        CompressedEmbeddingBagCollection as CompressedEmbeddingBagCollection,
        CompressedEmbeddingCollection as CompressedEmbeddingCollection,
    )

_HOMES = {
    "AnyPlan": "embcomp.collection.collection",
    "CompressedEmbeddingBagCollection": "embcomp.collection.collection",
    "CompressedEmbeddingCollection": "embcomp.collection.collection",
    "build_groups": "embcomp.collection.assembled",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
