"""Raw formats: one file each.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.data_pipelines.importers.registry import (
        IMPORTERS as IMPORTERS,
        make_importer as make_importer,
    )

_HOMES = dict.fromkeys(
    (
        "IMPORTERS",
        "make_importer",
    ),
    "embcomp.data_pipelines.importers.registry",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
