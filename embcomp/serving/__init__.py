"""Artefacts: saved, loaded, answering, looked into.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.serving.modules import (
        MakeRows as MakeRows,
        ServingEmbeddingBagCollection as ServingEmbeddingBagCollection,
        ServingEmbeddingCollection as ServingEmbeddingCollection,
        ServingModel as ServingModel,
        check_shapes as check_shapes,
        expected_tensors as expected_tensors,
        rows_class as rows_class,
    )
    from embcomp.serving.slot import Occupant as Occupant, ServingSlot as ServingSlot

_HOMES = dict.fromkeys(
    (
        "MakeRows",
        "ServingEmbeddingBagCollection",
        "ServingEmbeddingCollection",
        "ServingModel",
        "check_shapes",
        "expected_tensors",
        "rows_class",
    ),
    "embcomp.serving.modules",
) | dict.fromkeys(("Occupant", "ServingSlot"), "embcomp.serving.slot")

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
