"""What scores a candidate.

The names of the module are handed on, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embcomp.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from embcomp.search.evaluators.base import (
        Evaluator as Evaluator,
        Rung as Rung,
        Task as Task,
        TrialHandle as TrialHandle,
        TrialResult as TrialResult,
    )

_HOMES = dict.fromkeys(
    (
        "Evaluator",
        "TrialResult",
        "Rung",
        "TrialHandle",
        "Task",
    ),
    "embcomp.search.evaluators.base",
)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
