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
    from embcomp.collection.torchrec_states import (
        own_optimizer_state as own_optimizer_state,
        torchrec_optimizer_state as torchrec_optimizer_state,
        torchrec_state_dict as torchrec_state_dict,
    )

_HOMES = {
    "AnyPlan": "embcomp.collection.collection",
    "CompressedEmbeddingBagCollection": "embcomp.collection.collection",
    "CompressedEmbeddingCollection": "embcomp.collection.collection",
    "build_groups": "embcomp.collection.assembled",
    "own_optimizer_state": "embcomp.collection.torchrec_states",
    "torchrec_optimizer_state": "embcomp.collection.torchrec_states",
    "torchrec_state_dict": "embcomp.collection.torchrec_states",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
