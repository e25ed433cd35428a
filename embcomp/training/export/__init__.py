"""From a finished run to an artefact.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.training.export.export import (
        LATENCY_BATCHES as LATENCY_BATCHES,
    )
    from embcomp.training.export.export import (
        PROGRAM_TOLERANCE as PROGRAM_TOLERANCE,
    )
    from embcomp.training.export.export import (
        TOLERANCES as TOLERANCES,
    )
    from embcomp.training.export.export import (
        Export as Export,
    )
    from embcomp.training.export.export import (
        Format as Format,
    )
    from embcomp.training.export.export import (
        Latency as Latency,
    )
    from embcomp.training.export.export import (
        Parity as Parity,
    )
    from embcomp.training.export.export import (
        check_program as check_program,
    )
    from embcomp.training.export.export import (
        compare as compare,
    )
    from embcomp.training.export.export import (
        export_run as export_run,
    )
    from embcomp.training.export.export import (
        measure as measure,
    )
    from embcomp.training.export.export import (
        median_time as median_time,
    )
    from embcomp.training.export.export import (
        read_batches as read_batches,
    )
    from embcomp.training.export.export import (
        sliced_model as sliced_model,
    )

_HOMES = dict.fromkeys(
    (
        "Export",
        "Format",
        "LATENCY_BATCHES",
        "Latency",
        "PROGRAM_TOLERANCE",
        "Parity",
        "TOLERANCES",
        "check_program",
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
