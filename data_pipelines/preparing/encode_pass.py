"""The pass that encodes: rows of ids go to the Parquet files of their splits, in rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from embcomp.data_pipelines.preparing.count_pass import COUNTS
from embcomp.data_pipelines.preparing.counting import PartCounts, StoredPart
from embcomp.data_pipelines.preparing.encoding import (
    PartRows,
    PartSource,
    StoredIds,
    encode_part,
    plan_rounds,
    store_ids,
)
from embcomp.data_pipelines.preparing.engine import Advance, Part, map_parts
from embcomp.data_pipelines.preparing.input_parts import InputParts, rows_of
from embcomp.data_pipelines.preparing.numeric_figures import numeric_features
from embcomp.data_pipelines.preparing.part_sources import RawPart, StoredRows
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
from embcomp.io.digests import sha256_of_file

_ROWS = "rows"


@dataclass(frozen=True, kw_only=True)
class RoundTask:
    """One part of the input in an early round, which leaves the ids that it finds in a file.

    Attributes:
        source: the part.
        index: what the round looks up.
        path: the file of ids.
    """

    source: PartSource
    index: RoundIndex
    path: Path


@dataclass(frozen=True, kw_only=True)
class EncodeTask:
    """One part of the input in the last round, which writes its rows.

    Attributes:
        source: the part.
        index: what the round looks up.
        folder: where the rows go.
        number: of the part, for the names of its files.
        numeric: the numeric features, with the figures of their transforms.
        earlier: the files of ids that the early rounds left.
        rows_per_group: rows of a row group.
    """

    source: PartSource
    index: RoundIndex
    folder: Path
    number: int
    numeric: Sequence[NumericFeature]
    earlier: Sequence[Path]
    rows_per_group: int


def store_round(task: RoundTask, advance: Advance) -> StoredIds:
    """Find the ids of an early round for a part."""
    return store_ids(task.source, task.path, encoder=encoder_of(task.index), advance=advance)


def encode(task: EncodeTask, advance: Advance) -> PartRows:
    """Write the rows of a part."""
    return encode_part(
        task.source,
        folder=task.folder,
        number=task.number,
        features=task.index.features,
        numeric=task.numeric,
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
    partitions: int
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

    @cached_property
    def _at_once(self) -> int:
        stored = all(isinstance(source, StoredRows) for source in self.sources)
        if not (stored or self.settings.table.starts_anywhere):
            return 1
        return self.settings.at_once(len(self.sources))

    @cached_property
    def sources(self) -> list[PartSource]:
        """Where each part is taken from."""
        return [self._source(at) for at in range(len(self.source.parts))]

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
            path = self._ids_file(number, at)
            task = RoundTask(source=self.sources[at], index=self.rounds[number], path=path)
            seal = f"{_ROWS}/{path.stem}.json"
            parts.append(Part(seal=seal, task=task, size=rows_of(self.source.parts[at])))
        map_parts(
            self.settings.engine,
            self.work,
            store_round,
            parts,
            StoredIds,
            files=lambda task, stored: {task.path: stored.sha256},
            advance=advance,
            at_once=self._at_once,
        )

    def _encode(self, done: Sequence[PartRows | None], advance: Advance) -> list[PartRows]:
        """Write the rows of the parts that are left."""
        parts = []
        numeric = numeric_features(self.settings, self.counts)
        for at, blocks in enumerate(self.source.parts):
            task = EncodeTask(
                source=self.sources[at],
                index=self.rounds[-1],
                folder=self.work.path,
                number=at,
                numeric=numeric,
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
            at_once=self._at_once,
        )

    def _source(self, at: int) -> PartSource:
        """Where a part is taken from."""
        blocks = self.source.parts[at]
        stored = self._stored(at)
        if stored is None:
            return RawPart(
                table=self.settings.table,
                blocks=blocks,
                features=self.settings.features,
                split_of=self.source.split_of,
            )
        folder = self.work.scratch / COUNTS
        return StoredRows(
            rows=folder / stored.rows,
            runs=[folder / run for run in stored.runs],
            partitions=self.partitions,
            features=self.settings.features,
            size=rows_of(blocks),
        )

    def _stored(self, at: int) -> StoredPart | None:
        """What the count pass stored of a part, if it did and that is as it was."""
        stored = self.counts.stored[at]
        if stored is None or not self.work.resumed:
            return stored
        path = self.work.scratch / COUNTS / stored.rows
        is_same = path.is_file() and sha256_of_file(path) == stored.sha256
        return stored if is_same else None

    def _ids_file(self, number: int, at: int) -> Path:
        """Where a round leaves the ids of a part."""
        kind = "runs" if isinstance(self.sources[at], StoredRows) else "blocks"
        name = f"ids-{number}-{len(self.rounds)}-{at:05d}-{kind}.arrow"
        return self.work.scratch / _ROWS / name


def _forget_rounds(task: EncodeTask, part: PartRows) -> None:
    """Remove what early rounds left for a part that is written."""
    for path in task.earlier:
        path.unlink()
        path.with_suffix(".json").unlink()


def _mark(at: int) -> str:
    return f"{_ROWS}/part-{at:05d}.json"
