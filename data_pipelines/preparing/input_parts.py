"""The input as passes read it: parts that are finished one by one, and the split of each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from embcomp.data_pipelines.importers.base import TIME, Block, Rows
from embcomp.data_pipelines.loader.prefetch import ahead
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.preparing.time_order import smallest
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.data_pipelines.splits import SplitRule, TimeSplit


@dataclass(frozen=True, kw_only=True)
class RowSplit:
    """Which split each row of a block is in.

    Attributes:
        rule: the split rule.
        total: rows of the whole input.
        file_splits: the split that the caller gave each file, if any.
        last: the last times of train and of valid, of a split by time.
    """

    rule: SplitRule
    total: int
    file_splits: tuple[str | None, ...]
    last: tuple[float, ...] = ()

    def __call__(self, block: Block, rows: Rows) -> np.ndarray:
        """Return the index in `SPLITS` of each usable row of a block, (rows,) int8."""
        if isinstance(self.rule, TimeSplit):
            return self.rule.codes_of(rows.frame.get_column(TIME).to_numpy(), self.last)
        drawn = self.rule.codes(block.row, block.rows, self.total, self.file_splits[block.file])
        return drawn if rows.positions is None else drawn[rows.positions]


@dataclass(frozen=True, kw_only=True)
class InputParts:
    """The blocks of the input, some of them to a part.

    Attributes:
        parts: the blocks of each part.
        total: rows of the whole input, malformed ones included.
        split_of: gives the split of each usable row of a block.
    """

    parts: Sequence[Sequence[Block]]
    total: int
    split_of: RowSplit


class LastTimes(BaseModel):
    """The last times of train and of valid, of a split by time."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    last: list[float]


def cut_input(settings: PrepareSettings, work: Workspace, blocks: Sequence[Block]) -> InputParts:
    """Cut the input into parts; a split by time reads the times of all rows for that."""
    size = settings.blocks_per_part
    total = rows_of(blocks)
    return InputParts(
        parts=[blocks[i : i + size] for i in range(0, len(blocks), size)],
        total=total,
        split_of=_row_split(settings, work, blocks, total),
    )


def rows_of(blocks: Sequence[Block]) -> int:
    """Return how many rows some blocks have, malformed ones included."""
    return sum(block.rows for block in blocks)


def _row_split(
    settings: PrepareSettings, work: Workspace, blocks: Sequence[Block], total: int
) -> RowSplit:
    rule, last = settings.rule, tuple[float, ...]()
    if isinstance(rule, TimeSplit):
        by_time = rule
        found = work.once(
            "times.json", LastTimes, lambda: _last_times(settings, work, by_time, blocks)
        )
        last = tuple(found.last)
    splits = tuple(file.split for file in settings.table.files)
    return RowSplit(rule=rule, total=total, file_splits=splits, last=last)


def _last_times(
    settings: PrepareSettings, work: Workspace, rule: TimeSplit, blocks: Sequence[Block]
) -> LastTimes:
    """Read the times of all rows; return the last ones of train and of valid."""
    path = work.scratch / "times.f64"
    with (
        phase("times", rows_of(blocks), show=settings.progress) as advance,
        path.open("wb") as file,
    ):
        for block, rows in ahead(settings.table.read(blocks)):
            file.write(rows.frame.get_column(TIME).to_numpy().tobytes())
            advance(block.rows)
    limits = rule.limits(path.stat().st_size // 8)
    # No row is before the first one: -inf.
    last = [smallest(path, limit - 1) if limit else -math.inf for limit in limits]
    path.unlink()
    return LastTimes(last=last)
