"""From a finished run to an artefact.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.training.export.export import (
        LATENCY_BATCHES as LATENCY_BATCHES,
        TOLERANCES as TOLERANCES,
        Export as Export,
        Format as Format,
        Latency as Latency,
        Parity as Parity,
        compare as compare,
        export_run as export_run,
        measure as measure,
        median_time as median_time,
        read_batches as read_batches,
        sliced_model as sliced_model,
    )

_HOMES = dict.fromkeys(
    (
        "Export",
        "Format",
        "LATENCY_BATCHES",
        "Latency",
        "Parity",
        "TOLERANCES",
        "compare",
        "export_run",
        "measure",
        "median_time",
        "read_batches",
        "sliced_model",
    ),
    "embcomp.training.export.export",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
