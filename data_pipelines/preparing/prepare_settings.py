"""What one call of `prepare` was asked for, all its choices made."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from embcomp.data_pipelines.importers.base import RawTable
from embcomp.data_pipelines.preparing.engine import Engine, LocalEngine
from embcomp.data_pipelines.preparing.features import Features
from embcomp.data_pipelines.preparing.given_counts import GivenCounts
from embcomp.data_pipelines.preparing.growth import Growth
from embcomp.data_pipelines.schema import DatasetInfo, RawFormat
from embcomp.data_pipelines.splits import SplitRule

_TASK_MEMORY = 48 << 20
_MOST_TASKS = 8


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """The arguments of `prepare`, and what followed from them.

    Attributes:
        table: the raw input.
        features: the columns to prepare, with their transforms and least counts.
        rule: which split a row is in.
        name: the dataset's name.
        group: the categorical feature that GAUC groups by, if any.
        memory_budget: bytes for counts, vocabularies and indices, beside the blocks.
        max_bad_rows: the share of malformed rows above which the call fails.
        progress: whether to show bars on stderr.
        report: called with lines of news.
        rows_per_group: rows of a row group.
        blocks_per_part: blocks of a part, which is what a killed run loses at most.
        raw_format: how rows of the same format are read again, to be scored.
        growth: how vocabularies grow; None where the dataset stands for itself.
        engine: what runs the functions of passes.
        given: counts of values that someone else took; None where they are counted here.
    """

    table: RawTable
    features: Features
    rule: SplitRule
    name: str
    group: str | None
    memory_budget: int
    max_bad_rows: float
    progress: bool
    report: Callable[[str], None]
    rows_per_group: int
    blocks_per_part: int
    raw_format: RawFormat | None = None
    growth: Growth | None = None
    engine: Engine = field(default_factory=LocalEngine)
    given: GivenCounts | None = None

    @property
    def before(self) -> DatasetInfo | None:
        """The dataset that this one extends, if any."""
        return None if self.growth is None else self.growth.before

    def at_once(self, tasks: int) -> int:
        """How many of some tasks this process runs at a time: each takes its share of `memory_budget`."""
        if not self.engine.is_here:
            return 1
        room = self.memory_budget // _TASK_MEMORY
        return max(1, min(tasks, usable_cores(), _MOST_TASKS, room))


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
