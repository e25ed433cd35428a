"""Generated logs with a known best AUC, and toy datasets.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.data_pipelines.synthetic.generate import (
        TRUTH_SUFFIX as TRUTH_SUFFIX,
        draw as draw,
        write_criteo_log as write_criteo_log,
    )

_HOMES = dict.fromkeys(
    (
        "TRUTH_SUFFIX",
        "draw",
        "write_criteo_log",
    ),
    "embcomp.data_pipelines.synthetic.generate",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
