"""The passes of `prepare` over its input, each of which goes on where a killed run was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from embcomp.data_pipelines.numbering import can_number
from embcomp.data_pipelines.preparing.allocator import give_memory_back
from embcomp.data_pipelines.preparing.bad_rows import set_aside
from embcomp.data_pipelines.preparing.count_pass import CountPass
from embcomp.data_pipelines.preparing.counting import PartCounts
from embcomp.data_pipelines.preparing.describing import describe
from embcomp.data_pipelines.preparing.encode_pass import EncodePass
from embcomp.data_pipelines.preparing.encoding import PartRows
from embcomp.data_pipelines.preparing.given_counts import GivenPart, check_known, take_given
from embcomp.data_pipelines.preparing.index_pass import InputIndex, index_input
from embcomp.data_pipelines.preparing.input_parts import cut_input
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.rank_pass import rank_values
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.data_pipelines.schema import DatasetInfo

# Merging the counts of a value that stands alone in each run, beside its text.
_RUN_BYTES_PER_VALUE = 150


@dataclass(frozen=True, kw_only=True)
class PreparePasses:
    """One call of `prepare`, pass by pass."""

    settings: PrepareSettings
    work: Workspace

    def run(self) -> DatasetInfo:
        """Make the dataset and move it into place."""
        settings, work = self.settings, self.work
        if work.published:
            settings.report(f"{work.shown} was finished by an earlier, interrupted run")
            return DatasetInfo.load(work.shown)
        if work.resumed:
            settings.report("going on with what an earlier, interrupted run left")
        index = index_input(settings, work)
        if not work.resumed:
            work.check_space(self._disk_bytes(index))
        source = cut_input(settings, work, index.all_blocks())
        partitions = max(1, math.ceil(self._counting_bytes(index) / settings.memory_budget))
        counts = CountPass(
            settings=settings,
            work=work,
            source=source,
            partitions=partitions,
            store=self._can_store(index),
        ).run()
        give_memory_back()
        set_aside(settings, work, counts.bad)
        given = self._given(partitions)
        ranked = rank_values(settings, work, counts, partitions, given)
        give_memory_back()
        parts = EncodePass(
            settings=settings,
            work=work,
            source=source,
            partitions=partitions,
            counts=counts,
            ranked=ranked,
        ).run()
        self._check_known(counts, parts)
        describe(settings, index, counts, ranked, parts).save(work.path)
        work.publish()
        return DatasetInfo.load(work.shown)

    def _disk_bytes(self, index: InputIndex) -> int:
        features = self.settings.features
        columns = len(features.numeric) + len(features.categorical) + 1 + features.weighted
        return int(0.4 * index.text_bytes) + 4 * columns * index.rows

    def _can_store(self, index: InputIndex) -> bool:
        """Whether rows are stored on the way, so that no text is read twice.

        That takes a compiler and disk of this machine, and vocabularies that are made here.
        """
        features = self.settings.features
        if not (can_number() and self.settings.engine.is_here and features.are_all_counted):
            return False
        numbers = 4 * len(features.categorical) + 8 * len(features.numeric) + 16
        bags = any(feature.multi_valued for feature in features.categorical)
        # Each value of a bag has a number of 4 bytes, and at least two of text.
        stored = index.rows * numbers + 2 * index.text_bytes * bags + 2 * index.text_bytes
        return self.work.has_space(self._disk_bytes(index) + stored)

    def _counting_bytes(self, index: InputIndex) -> int:
        """The worst case: one feature holds all of the text, and no value occurs twice."""
        bags = any(feature.multi_valued for feature in self.settings.features.categorical)
        values = max(index.rows, index.text_bytes // 8) if bags else index.rows
        counting = values * _RUN_BYTES_PER_VALUE + index.text_bytes
        given = self.settings.given
        return counting if given is None else max(counting, given.counting_bytes)

    def _given(self, partitions: int) -> GivenPart | None:
        """Take in the counts of someone else, if there are any."""
        settings = self.settings
        if settings.given is None:
            return None
        features = settings.features.categorical
        return take_given(
            settings.given,
            settings.engine,
            self.work,
            features=[feature.name for feature in features],
            wanted=[feature.name for feature in features if feature.counted_before],
            partitions=partitions,
            limit=settings.memory_budget // 6,
        )

    def _check_known(self, counts: PartCounts, parts: Sequence[PartRows]) -> None:
        """Compare the train split with counts that were taken elsewhere."""
        settings = self.settings
        for feature in settings.features.categorical:
            if settings.given is None or not feature.counted_before:
                continue
            unseen = sum(part.unseen.get("train", {}).get(feature.name, 0) for part in parts)
            values = counts.categorical[feature.name].train_values
            check_known(settings.given, feature.name, values, unseen, settings.report)
