"""The pass that encodes: rows of ids go to the Parquet files of their splits, in rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from embcomp.data_pipelines.preparing.counting import PartCounts
from embcomp.data_pipelines.preparing.encoding import (
    Encoder,
    PartRows,
    Slice,
    StoredIds,
    encode_part,
    plan_rounds,
    store_ids,
)
from embcomp.data_pipelines.preparing.input_parts import InputParts, rows_of
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.preparing.rank_pass import vocabulary_path
from embcomp.data_pipelines.preparing.vocabulary import Ranked
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.data_pipelines.schema import NumericFeature
from embcomp.data_pipelines.transforms import NumericStats

_ROWS = "rows"
Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class EncodePass:
    """Writes rows part by part; each round but the last leaves on disk the ids that it found."""

    settings: PrepareSettings
    work: Workspace
    source: InputParts
    counts: PartCounts
    ranked: Sequence[Ranked]

    @cached_property
    def rounds(self) -> list[list[Slice]]:
        """The slices of vocabularies whose indices are held in each round."""
        return plan_rounds([found.kept for found in self.ranked], self.settings.memory_budget)

    def run(self) -> list[PartRows]:
        """Return what was written, for each part."""
        (self.work.scratch / _ROWS).mkdir(exist_ok=True)
        # What an earlier run finished needs no early round either.
        done = [self.work.earlier(_mark(at), PartRows) for at in range(len(self.source.parts))]
        vocabularies = [
            vocabulary_path(self.settings, self.work, place) for place in range(len(self.ranked))
        ]
        total = self.source.total * len(self.rounds)
        with phase("encode", total, show=self.settings.progress) as advance:
            for number, slices in enumerate(self.rounds):
                with Encoder(self.settings.features, vocabularies, slices, _threads()) as encoder:
                    for at, blocks in enumerate(self.source.parts):
                        if done[at] is not None:
                            advance(rows_of(blocks))
                        elif number < len(self.rounds) - 1:
                            self._store(number, at, encoder, advance)
                        else:
                            done[at] = self._encode(at, encoder, advance)
        return [part for part in done if part is not None]

    def _store(self, number: int, at: int, encoder: Encoder, advance: Advance) -> None:
        """Let one part go through an early round."""
        path, blocks = self._ids_file(number, at), self.source.parts[at]
        self.work.once(
            f"{_ROWS}/{path.stem}.json",
            StoredIds,
            lambda: store_ids(
                self.settings.table,
                blocks,
                path,
                features=self.settings.features,
                encoder=encoder,
                advance=advance,
            ),
            files=lambda stored: {path: stored.sha256},
            skip=lambda: advance(rows_of(blocks)),
        )

    def _encode(self, at: int, encoder: Encoder, advance: Advance) -> PartRows:
        """Write the rows of one part in the last round."""
        earlier = [self._ids_file(number, at) for number in range(len(self.rounds) - 1)]
        part = self.work.once(
            _mark(at),
            PartRows,
            lambda: encode_part(
                self.settings.table,
                self.source.parts[at],
                folder=self.work.path,
                number=at,
                features=self.settings.features,
                numeric=numeric_features(self.settings, self.counts),
                split_of=self.source.split_of,
                encoder=encoder,
                earlier=earlier,
                rows_per_group=self.settings.rows_per_group,
                advance=advance,
            ),
            files=lambda part: {
                self.work.path / name: part.records[split].sha256
                for split, name in part.files.items()
            },
        )
        for path in earlier:
            path.unlink()
            path.with_suffix(".json").unlink()
        return part

    def _ids_file(self, number: int, at: int) -> Path:
        """Where a round leaves the ids of a part."""
        name = f"ids-{number}-{len(self.rounds)}-{at:05d}.arrow"
        return self.work.scratch / _ROWS / name


def numeric_features(settings: PrepareSettings, counts: PartCounts) -> list[NumericFeature]:
    """Return the numeric features with what their transforms take from the train split.

    A dataset that extends another takes the other's figures: a number means today what it meant then.
    """
    found = []
    for column in settings.features.numeric:
        missing = counts.numeric_missing.get(column.name, 0)
        stats = counts.numeric.get(column.name, NumericStats())
        found.append(stats.feature(column.name, column.transform, missing))
    if settings.before is None:
        return found
    return [
        then.model_copy(update={"missing": now.missing, "clipped": 0})
        for then, now in zip(settings.before.numeric, found)
    ]


def _mark(at: int) -> str:
    return f"{_ROWS}/part-{at:05d}.json"


def _threads() -> int:
    return max(1, min(pl.thread_pool_size(), 8))
