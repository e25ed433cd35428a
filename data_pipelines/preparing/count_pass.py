"""The pass that counts: rows and labels of each split, and how often each raw value occurs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from embcomp.data_pipelines.importers.base import Block, RawTable
from embcomp.data_pipelines.preparing.bad_rows import BadRowLimit
from embcomp.data_pipelines.preparing.counting import (
    CountedValues,
    PartCounts,
    ValueSink,
    count_part,
)
from embcomp.data_pipelines.preparing.engine import Advance, Part, map_parts
from embcomp.data_pipelines.preparing.features import Features
from embcomp.data_pipelines.preparing.input_parts import InputParts, RowSplit, rows_of
from embcomp.data_pipelines.preparing.numeric_figures import known_figures
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.preparing.stored_part import StoredValues
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.data_pipelines.sample_weights import check_sums
from embcomp.data_pipelines.schema import NumericFeature
from embcomp.data_pipelines.splits import SPLITS
from embcomp.errors import DataError

COUNTS = "counts"
"""Where the scratch folder holds the run files."""
MERGING, NUMBERING = 6, 2
"""Into how many times its size counts grow when they are merged, and numbered values when they are written."""


@dataclass(frozen=True, kw_only=True)
class CountTask:
    """One part of the input to count.

    Attributes:
        table: the raw input.
        blocks: of the part.
        features: what is counted.
        split_of: gives the split of each usable row of a block.
        bad_rows: how many malformed rows there may be.
        partitions: into how many parts values are cut by their hash.
        folder: where run files go.
        prefix: what their names begin with.
        budget: bytes that counting may take.
        known: numeric features whose transforms need no figures of this input, by name, where rows are to be
            stored for the encode pass; None where they are not.
    """

    table: RawTable
    blocks: Sequence[Block]
    features: Features
    split_of: RowSplit
    bad_rows: BadRowLimit
    partitions: int
    folder: Path
    prefix: str
    budget: int
    known: Mapping[str, NumericFeature] | None


def count(task: CountTask, advance: Advance) -> PartCounts:
    """Count a part of the input."""
    with _sink(task) as sink, task.table.for_part() as table:
        return count_part(
            table,
            task.blocks,
            features=task.features,
            split_of=task.split_of,
            runs=sink,
            check_bad=task.bad_rows.check,
            advance=advance,
        )


@contextmanager
def _sink(task: CountTask) -> Iterator[ValueSink]:
    """What takes a part's values in: their numbers and rows, or counts alone."""
    if task.known is None:
        yield CountedValues(
            task.features, task.partitions, task.folder, task.prefix, task.budget // MERGING
        )
        return
    with StoredValues(
        features=task.features,
        known=task.known,
        partitions=task.partitions,
        folder=task.folder,
        prefix=task.prefix,
        limit=task.budget // NUMBERING,
    ) as values:
        yield values


@dataclass(frozen=True, kw_only=True)
class CountPass:
    """Counts part by part; values are cut into `partitions` by their hash."""

    settings: PrepareSettings
    work: Workspace
    source: InputParts
    partitions: int
    store: bool

    def run(self) -> PartCounts:
        """Return the figures of the whole input."""
        total, settings = self.source.total, self.settings
        (self.work.scratch / COUNTS).mkdir(exist_ok=True)
        parts = [self._part(number, blocks) for number, blocks in enumerate(self.source.parts)]
        seen = PartCounts()

        def take(_: CountTask, part: PartCounts) -> None:
            seen.bad.extend(part.bad)
            self._bad_rows.check([line.row() for line in seen.bad])

        with phase("count", total, show=settings.progress) as advance:
            counted = map_parts(
                settings.engine,
                self.work,
                count,
                parts,
                PartCounts,
                files=lambda task, part: {task.folder / run: sha for run, sha in part.runs.items()},
                advance=advance,
                taken=take,
                at_once=self._at_once,
            )
        found = PartCounts()
        for part in counted:
            found.merge(part)
        self._bad_rows.check([line.row() for line in found.bad])
        if found.rows[0] == 0:
            raise DataError(
                f"no row is in the train split: {total} rows were read, {found.dropped} left out "
                f"by the label rule, {len(found.bad)} malformed"
            )
        weight = settings.table.layout.weight
        if weight is not None:
            check_sums(weight, dict(zip(SPLITS, found.rows)), dict(zip(SPLITS, found.weights)))
        return found

    @property
    def _at_once(self) -> int:
        if not self.settings.table.starts_anywhere:
            return 1
        return self.settings.at_once(len(self.source.parts))

    @property
    def _bad_rows(self) -> BadRowLimit:
        return BadRowLimit(share=self.settings.max_bad_rows, total=self.source.total)

    def _part(self, number: int, blocks: Sequence[Block]) -> Part[CountTask]:
        name = f"part-{number:05d}-{self.partitions}"
        task = CountTask(
            table=self.settings.table,
            blocks=blocks,
            features=self.settings.features,
            split_of=self.source.split_of,
            bad_rows=self._bad_rows,
            partitions=self.partitions,
            folder=self.work.scratch / COUNTS,
            prefix=name,
            budget=self.settings.memory_budget // self._at_once,
            known=known_figures(self.settings) if self.store else None,
        )
        return Part(seal=f"{COUNTS}/{name}.json", task=task, size=rows_of(blocks))
