"""Methods that are trained in stages, with settings that make every stage short."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StagedCase:
    """One method.

    Attributes:
        method: As in `tables.method`.
        budget: As in `tables.budget`; None leaves the method at its own size.
        stages: As in `train.stages`.
        starts_from_full: Whether the first stage's tables are full ones.
        ranks: On how many ranks it is compared with one process.
    """

    method: dict[str, Any]
    budget: str | None = None
    stages: dict[str, Any] = field(default_factory=dict)
    starts_from_full: bool = False
    ranks: int = 2


STAGED: dict[str, StagedCase] = {}
