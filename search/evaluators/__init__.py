"""What scores a candidate.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.search.evaluators.base import (
        Evaluator as Evaluator,
        Outcome as Outcome,
        Rung as Rung,
        Running as Running,
        Task as Task,
    )

_HOMES = dict.fromkeys(
    (
        "Evaluator",
        "Outcome",
        "Rung",
        "Running",
        "Task",
    ),
    "embcomp.search.evaluators.base",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
