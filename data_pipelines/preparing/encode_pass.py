"""The pass that encodes: rows of ids go to the Parquet files of their splits, in rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from embcomp.data_pipelines.importers.base import Block, RawTable
from embcomp.data_pipelines.preparing.counting import PartCounts
from embcomp.data_pipelines.preparing.encoding import (
    PartRows,
    StoredIds,
    encode_part,
    plan_rounds,
    store_ids,
)
from embcomp.data_pipelines.preparing.engine import Advance, Part, map_parts
from embcomp.data_pipelines.preparing.input_parts import InputParts, RowSplit, rows_of
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.preparing.rank_pass import vocabulary_path
from embcomp.data_pipelines.preparing.round_index import (
    RoundIndex,
    encoder_of,
    release_encoder,
)
from embcomp.data_pipelines.preparing.vocabulary import Ranked
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.data_pipelines.schema import NumericFeature
from embcomp.data_pipelines.transforms import NumericStats

_ROWS = "rows"


@dataclass(frozen=True, kw_only=True)
class RoundTask:
    """One part of the input in an early round, which leaves the ids that it finds in a file.

    Attributes:
        table: the raw input.
        blocks: of the part.
        index: what the round looks up.
        path: the file of ids.
    """

    table: RawTable
    blocks: Sequence[Block]
    index: RoundIndex
    path: Path


@dataclass(frozen=True, kw_only=True)
class EncodeTask:
    """One part of the input in the last round, which writes its rows.

    Attributes:
        table: the raw input.
        blocks: of the part.
        index: what the round looks up.
        folder: where the rows go.
        number: of the part, for the names of its files.
        numeric: the numeric features, with the figures of their transforms.
        split_of: gives the split of each usable row of a block.
        earlier: the files of ids that the early rounds left.
        rows_per_group: rows of a row group.
    """

    table: RawTable
    blocks: Sequence[Block]
    index: RoundIndex
    folder: Path
    number: int
    numeric: Sequence[NumericFeature]
    split_of: RowSplit
    earlier: Sequence[Path]
    rows_per_group: int


def store_round(task: RoundTask, advance: Advance) -> StoredIds:
    """Find the ids of an early round for a part."""
    return store_ids(
        task.table,
        task.blocks,
        task.path,
        features=task.index.features,
        encoder=encoder_of(task.index),
        advance=advance,
    )


def encode(task: EncodeTask, advance: Advance) -> PartRows:
    """Write the rows of a part."""
    return encode_part(
        task.table,
        task.blocks,
        folder=task.folder,
        number=task.number,
        features=task.index.features,
        numeric=task.numeric,
        split_of=task.split_of,
        encoder=encoder_of(task.index),
        earlier=task.earlier,
        rows_per_group=task.rows_per_group,
        advance=advance,
    )


@dataclass(frozen=True, kw_only=True)
class EncodePass:
    """Writes rows part by part; each round but the last leaves on disk the ids that it found."""

    settings: PrepareSettings
    work: Workspace
    source: InputParts
    counts: PartCounts
    ranked: Sequence[Ranked]

    @cached_property
    def rounds(self) -> list[RoundIndex]:
        """The slices of vocabularies whose indices are held in each round."""
        return [
            RoundIndex(
                features=self.settings.features,
                vocabularies=tuple(
                    vocabulary_path(self.settings, self.work, place)
                    for place in range(len(self.ranked))
                ),
                digests=tuple(
                    "" if found.record is None else found.record.sha256 for found in self.ranked
                ),
                slices=tuple(slices),
            )
            for slices in plan_rounds(
                [
                    0 if feature.num_embeddings is not None else found.kept
                    for feature, found in zip(self.settings.features.categorical, self.ranked)
                ],
                self.settings.memory_budget,
            )
        ]

    def run(self) -> list[PartRows]:
        """Return what was written, for each part."""
        (self.work.scratch / _ROWS).mkdir(exist_ok=True)
        # What an earlier run finished needs no early round either.
        done = [self.work.earlier(_mark(at), PartRows) for at in range(len(self.source.parts))]
        left = [at for at, part in enumerate(done) if part is None]
        total = self.source.total * len(self.rounds)
        try:
            with phase("encode", total, show=self.settings.progress) as advance:
                finished = total - len(self.rounds) * sum(
                    rows_of(self.source.parts[at]) for at in left
                )
                advance(finished - finished // len(self.rounds))
                for number in range(len(self.rounds) - 1):
                    self._store(number, left, advance)
                return self._encode(done, advance)
        finally:
            release_encoder()

    def _store(self, number: int, left: Sequence[int], advance: Advance) -> None:
        """Let the parts that are left go through an early round."""
        parts = []
        for at in left:
            path, blocks = self._ids_file(number, at), self.source.parts[at]
            task = RoundTask(
                table=self.settings.table, blocks=blocks, index=self.rounds[number], path=path
            )
            seal = f"{_ROWS}/{path.stem}.json"
            parts.append(Part(seal=seal, task=task, size=rows_of(blocks)))
        map_parts(
            self.settings.engine,
            self.work,
            store_round,
            parts,
            StoredIds,
            files=lambda task, stored: {task.path: stored.sha256},
            advance=advance,
        )

    def _encode(self, done: Sequence[PartRows | None], advance: Advance) -> list[PartRows]:
        """Write the rows of the parts that are left."""
        parts = []
        numeric = numeric_features(self.settings, self.counts)
        for at, blocks in enumerate(self.source.parts):
            task = EncodeTask(
                table=self.settings.table,
                blocks=blocks,
                index=self.rounds[-1],
                folder=self.work.path,
                number=at,
                numeric=numeric,
                split_of=self.source.split_of,
                earlier=[self._ids_file(number, at) for number in range(len(self.rounds) - 1)],
                rows_per_group=self.settings.rows_per_group,
            )
            parts.append(Part(seal=_mark(at), task=task, size=rows_of(blocks)))
        return map_parts(
            self.settings.engine,
            self.work,
            encode,
            parts,
            PartRows,
            files=lambda task, part: {
                task.folder / name: part.records[split].sha256 for split, name in part.files.items()
            },
            advance=advance,
            known=done,
            taken=_forget_rounds,
        )

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


def _forget_rounds(task: EncodeTask, part: PartRows) -> None:
    """Remove what early rounds left for a part that is written."""
    for path in task.earlier:
        path.unlink()
        path.with_suffix(".json").unlink()


def _mark(at: int) -> str:
    return f"{_ROWS}/part-{at:05d}.json"
