"""The pass that counts: rows and labels of each split, and how often each raw value occurs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from embcomp.data_pipelines.importers.base import Block
from embcomp.data_pipelines.preparing.bad_rows import check_bad_rows
from embcomp.data_pipelines.preparing.counting import PartCounts, RunWriter, count_part
from embcomp.data_pipelines.preparing.input_parts import InputParts, rows_of
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.data_pipelines.sample_weights import check_sums
from embcomp.data_pipelines.splits import SPLITS
from embcomp.errors import DataError

COUNTS = "counts"
"""Where the scratch folder holds the run files."""


@dataclass(kw_only=True)
class CountPass:
    """Counts part by part; values are cut into `partitions` by their hash."""

    settings: PrepareSettings
    work: Workspace
    source: InputParts
    partitions: int
    found: PartCounts = field(default_factory=PartCounts)

    def run(self) -> PartCounts:
        """Return the figures of the whole input."""
        total, found = self.source.total, self.found
        (self.work.scratch / COUNTS).mkdir(exist_ok=True)
        with phase("count", total, show=self.settings.progress) as advance:
            for number, blocks in enumerate(self.source.parts):
                found.merge(self._part(number, blocks, advance))
        if found.rows[0] == 0:
            raise DataError(
                f"no row is in the train split: {total} rows were read, {found.dropped} left out "
                f"by the label rule, {len(found.bad)} malformed"
            )
        weight = self.settings.table.layout.weight
        if weight is not None:
            check_sums(weight, dict(zip(SPLITS, found.rows)), dict(zip(SPLITS, found.weights)))
        return found

    def _part(
        self, number: int, blocks: Sequence[Block], advance: Callable[[int], None]
    ) -> PartCounts:
        folder, name = self.work.scratch / COUNTS, f"part-{number:05d}-{self.partitions}"

        def count() -> PartCounts:
            features = self.settings.features
            return count_part(
                self.settings.table,
                blocks,
                features=features,
                split_of=self.source.split_of,
                runs=RunWriter(
                    features=len(features.categorical),
                    partitions=self.partitions,
                    folder=folder,
                    prefix=name,
                    limit=self.settings.memory_budget // 6,
                ),
                check_bad=lambda here: check_bad_rows(
                    self.settings, self.found.bad, here, self.source.total
                ),
                advance=advance,
            )

        return self.work.once(
            f"{COUNTS}/{name}.json",
            PartCounts,
            count,
            files=lambda part: {folder / run: sha256 for run, sha256 in part.runs.items()},
            skip=lambda: advance(rows_of(blocks)),
        )
