"""Malformed rows: how many are too many, and where the others are set aside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from embcomp.data_pipelines.importers.base import BadRow
from embcomp.data_pipelines.preparing.counting import BadLine
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.data_pipelines.splits import exact
from embcomp.errors import DataError

BAD_ROWS_FILE = "bad_rows.tsv"
_SHOWN_BAD_ROWS = 5


@dataclass(frozen=True, kw_only=True)
class BadRowLimit:
    """How many of `total` rows may be malformed: a share of them."""

    share: float
    total: int

    def check(self, found: Sequence[BadRow]) -> None:
        """Raise a DataError when there are more malformed rows than allowed."""
        if len(found) <= math.floor(exact(self.share) * self.total):
            return
        shown = "\n".join(f"  {row}" for row in found[:_SHOWN_BAD_ROWS])
        raise DataError(
            f"at least {len(found)} of {self.total} rows are malformed, more than the share of "
            f"{self.share:g} that is allowed; the first:\n{shown}\nIf the importer and the "
            f"schema are the right ones, mend the rows or allow a larger share (--max-bad-rows)"
        )


def set_aside(settings: PrepareSettings, work: Workspace, lines: Sequence[BadLine]) -> None:
    """Write the malformed rows, if there are any, into a file of the dataset."""
    if not lines:
        return
    rows = [line.row() for line in lines]
    with (work.path / BAD_ROWS_FILE).open("wb") as file:
        for row in rows:
            head = f"{row.path}\t{row.line}\t{row.reason}\t"
            file.write(head.encode() + row.raw + b"\n")
    settings.report(f"{len(rows)} malformed rows were set aside in {BAD_ROWS_FILE}; the first:")
    for row in rows[:_SHOWN_BAD_ROWS]:
        settings.report(f"  {row}")
