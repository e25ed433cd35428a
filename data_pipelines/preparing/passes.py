"""The passes of `prepare` over its input, each of which goes on where a killed run was."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from embcomp.data_pipelines.bayes_metrics import read_bayes
from embcomp.data_pipelines.importers.base import TIME, BadRow, Block, RawTable, Rows
from embcomp.data_pipelines.loader.prefetch import ahead
from embcomp.data_pipelines.preparing.counting import PartCounts, RunWriter, SplitOf, count_part
from embcomp.data_pipelines.preparing.encoding import (
    Encoder,
    PartRows,
    StoredIds,
    encode_part,
    plan_rounds,
    store_ids,
    unseen_rates,
)
from embcomp.data_pipelines.preparing.features import Features
from embcomp.data_pipelines.preparing.pieces import read_piece, write_piece
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.preparing.time_order import smallest
from embcomp.data_pipelines.preparing.vocabulary import Ranked, build_vocabulary
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.data_pipelines.schema import (
    FIRST_ID,
    BayesMetrics,
    CategoricalFeature,
    DatasetInfo,
    FileRecord,
    RawFormat,
    SourceFile,
    SplitInfo,
)
from embcomp.data_pipelines.splits import SPLITS, SplitRule, TimeSplit, exact
from embcomp.data_pipelines.transforms import NumericStats
from embcomp.errors import DataError

BAD_ROWS_FILE = "bad_rows.tsv"
_SHOWN_BAD_ROWS = 5
# Merging the counts of a value that stands alone in each run, beside its text.
_RUN_BYTES_PER_VALUE = 150
_BLOCK_KEYS = ("file", "start", "end", "line", "row", "rows")


def versions() -> dict[str, str]:
    """Return the versions that the bytes of a dataset depend on: Arrow's writer names itself."""
    return {"embcomp": version("embcomp"), "pyarrow": pa.__version__}


class _IndexState(BaseModel):
    """What the index pass found, kept for a resumed run."""

    blocks: list[list[int]]
    sources: list[SourceFile]
    text_bytes: int


class _LastTimes(BaseModel):
    """The last times of train and of valid, of a split by time."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    last: list[float]


@dataclass(kw_only=True)
class PreparePasses:
    """One call of `prepare`, pass by pass."""

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
    work: Workspace
    raw_format: RawFormat | None = None

    def run(self) -> DatasetInfo:
        """Make the dataset and move it into place."""
        if self.work.published:
            self.report(f"{self.work.shown} was finished by an earlier, interrupted run")
            return DatasetInfo.load(self.work.shown)
        if self.work.resumed:
            self.report("going on with what an earlier, interrupted run left")
        index = self._index()
        blocks = [Block(**dict(zip(_BLOCK_KEYS, row))) for row in index.blocks]
        total = blocks[-1].row + blocks[-1].rows
        parts = [
            blocks[i : i + self.blocks_per_part]
            for i in range(0, len(blocks), self.blocks_per_part)
        ]
        if not self.work.resumed:
            columns = len(self.features.numeric) + len(self.features.categorical) + 1
            self.work.check_space(int(0.4 * index.text_bytes) + 4 * columns * total)
        # The worst case: one feature holds all of the text, and no value occurs twice.
        bags = any(feature.multi_valued for feature in self.features.categorical)
        values = max(total, index.text_bytes // 8) if bags else total
        worst = values * _RUN_BYTES_PER_VALUE + index.text_bytes
        partitions = max(1, math.ceil(worst / self.memory_budget))
        split_of = self._split_of(parts, total)
        counts = self._count(parts, split_of, total, partitions)
        self._quarantine(counts)
        ranked = self._rank(counts, partitions)
        encoded = self._encode(parts, split_of, total, counts, ranked)
        info = self._describe(index, total, counts, ranked, encoded)
        info.save(self.work.path)
        self.work.publish()
        return DatasetInfo.load(self.work.shown)

    def _index(self) -> _IndexState:
        mark = self.work.scratch / "index.json"
        earlier = read_piece(mark, _IndexState, self.report)
        if earlier is not None:
            return earlier
        blocks: list[Block] = []
        sources: list[SourceFile] = []
        text_bytes = 0
        size = sum(file.path.stat().st_size for file in self.table.files)
        with phase("index", size, show=self.progress) as advance:
            for number, file in enumerate(self.table.files):
                row = blocks[-1].row + blocks[-1].rows if blocks else 0
                found = self.table.index(number, row, advance)
                blocks += found.blocks
                text_bytes += found.text_bytes
                sources.append(
                    SourceFile(path=str(file.path), bytes=found.bytes, sha256=found.sha256)
                )
        if not blocks:
            # Parts without rows are common where a cluster wrote them; nothing but such is not.
            raise DataError(f"{self.table.files[0].path} has no rows")
        rows = [[b.file, b.start, b.end, b.line, b.row, b.rows] for b in blocks]
        index = _IndexState(blocks=rows, sources=sources, text_bytes=text_bytes)
        write_piece(mark, index)
        return index

    def _split_of(self, parts: Sequence[Sequence[Block]], total: int) -> SplitOf:
        if isinstance(self.rule, TimeSplit):
            rule = self.rule
            last = self._last_times(rule, parts, total)
            return lambda _, rows: rule.codes_of(rows.frame.get_column(TIME).to_numpy(), last)

        def codes(block: Block, rows: Rows) -> np.ndarray:
            file_split = self.table.files[block.file].split
            drawn = self.rule.codes(block.row, block.rows, total, file_split)
            return drawn if rows.positions is None else drawn[rows.positions]

        return codes

    def _last_times(
        self, rule: TimeSplit, parts: Sequence[Sequence[Block]], total: int
    ) -> list[float]:
        """Read the times of all rows; return the last ones of train and of valid."""
        mark = self.work.scratch / "times.json"
        found = read_piece(mark, _LastTimes, self.report)
        if found is None:
            path = self.work.scratch / "times.f64"
            with phase("times", total, show=self.progress) as advance, path.open("wb") as file:
                for block, rows in ahead(self.table.read([b for part in parts for b in part])):
                    file.write(rows.frame.get_column(TIME).to_numpy().tobytes())
                    advance(block.rows)
            limits = rule.limits(path.stat().st_size // 8)
            # No row is before the first one: -inf.
            last = [smallest(path, limit - 1) if limit else -math.inf for limit in limits]
            path.unlink()
            found = _LastTimes(last=last)
            write_piece(mark, found)
        return found.last

    def _count(
        self,
        parts: Sequence[Sequence[Block]],
        split_of: SplitOf,
        total: int,
        partitions: int,
    ) -> PartCounts:
        folder = self.work.scratch / "counts"
        folder.mkdir(exist_ok=True)
        allowed = math.floor(exact(self.max_bad_rows) * total)
        whole = PartCounts()

        def check_bad(here: int, rows: Iterable[BadRow]) -> None:
            if len(whole.bad) + here > allowed:
                first = [line.row() for line in whole.bad] + list(rows)
                self._too_many(first, total)

        with phase("count", total, show=self.progress) as advance:
            for number, blocks in enumerate(parts):
                mark = folder / f"part-{number:05d}-{partitions}.json"
                part = read_piece(mark, PartCounts, self.report)
                if part is not None:
                    advance(sum(block.rows for block in blocks))
                else:
                    runs = RunWriter(
                        features=len(self.features.categorical),
                        partitions=partitions,
                        folder=folder,
                        prefix=f"part-{number:05d}-{partitions}",
                        limit=self.memory_budget // 6,
                    )
                    part = count_part(
                        self.table,
                        blocks,
                        features=self.features,
                        split_of=split_of,
                        runs=runs,
                        check_bad=check_bad,
                        advance=advance,
                    )
                    write_piece(mark, part, part.runs)
                whole.merge(part)
        if whole.rows[0] == 0:
            raise DataError(
                f"no row is in the train split: {total} rows were read, {whole.dropped} left out "
                f"by the label rule, {len(whole.bad)} malformed"
            )
        return whole

    def _too_many(self, bad: list[BadRow], total: int) -> None:
        shown = "\n".join(f"  {row}" for row in bad[:_SHOWN_BAD_ROWS])
        raise DataError(
            f"at least {len(bad)} of {total} rows are malformed, more than the share of "
            f"{self.max_bad_rows:g} that is allowed; the first:\n{shown}\nIf the importer and the "
            f"schema are the right ones, mend the rows or allow a larger share (--max-bad-rows)"
        )

    def _quarantine(self, counts: PartCounts) -> None:
        if not counts.bad:
            return
        rows = [line.row() for line in counts.bad]
        with (self.work.path / BAD_ROWS_FILE).open("wb") as file:
            for row in rows:
                head = f"{row.path}\t{row.line}\t{row.reason}\t"
                file.write(head.encode() + row.raw + b"\n")
        self.report(f"{len(rows)} malformed rows were set aside in {BAD_ROWS_FILE}; the first:")
        for row in rows[:_SHOWN_BAD_ROWS]:
            self.report(f"  {row}")

    def _rank(self, counts: PartCounts, partitions: int) -> list[Ranked]:
        folder = self.work.path / "vocabulary"
        folder.mkdir(exist_ok=True)
        marks = self.work.scratch / "ranked"
        marks.mkdir(exist_ok=True)
        runs = [self.work.scratch / "counts" / run for run in counts.runs]
        ranked: list[Ranked] = []
        features = self.features.categorical
        with phase("rank", len(features), show=self.progress) as advance:
            for i, feature in enumerate(features):
                mark = marks / f"{i:05d}.json"
                found = read_piece(mark, Ranked, self.report)
                if found is None:
                    figures = counts.categorical[feature.name]
                    missing = 0 if feature.multi_valued else figures.train_missing
                    found = build_vocabulary(
                        runs,
                        self._vocabulary(i),
                        feature=i,
                        name=feature.name,
                        partitions=partitions,
                        min_count=feature.min_count,
                        missing=missing,
                        total=missing + figures.train_values,
                        limit=self.memory_budget,
                        scratch=marks,
                    )
                    assert found.record is not None
                    files = {os.path.relpath(self._vocabulary(i), marks): found.record.sha256}
                    write_piece(mark, found, files)
                ranked.append(found)
                advance(1)
        return ranked

    def _vocabulary(self, feature: int) -> Path:
        return self.work.path / vocabulary_file(self.features.categorical[feature].name, feature)

    def _encode(
        self,
        parts: Sequence[Sequence[Block]],
        split_of: SplitOf,
        total: int,
        counts: PartCounts,
        ranked: Sequence[Ranked],
    ) -> list[PartRows]:
        folder = self.work.scratch / "rows"
        folder.mkdir(exist_ok=True)
        vocabularies = [self._vocabulary(i) for i in range(len(ranked))]
        rounds = plan_rounds([r.kept for r in ranked], self.memory_budget)
        done = [
            read_piece(folder / f"part-{at:05d}.json", PartRows, self.report)
            for at in range(len(parts))
        ]
        with phase("encode", total * len(rounds), show=self.progress) as advance:
            for number, slices in enumerate(rounds):
                last = number == len(rounds) - 1
                with Encoder(self.features, vocabularies, slices, _threads()) as encoder:
                    for at, blocks in enumerate(parts):
                        if done[at] is not None:
                            advance(sum(block.rows for block in blocks))
                        elif not last:
                            self._store(folder, number, len(rounds), at, blocks, encoder, advance)
                        else:
                            done[at] = self._encode_part(
                                folder, len(rounds), at, blocks, split_of, counts, encoder, advance
                            )
        return [part for part in done if part is not None]

    def _store(
        self,
        folder: Path,
        number: int,
        rounds: int,
        at: int,
        blocks: Sequence[Block],
        encoder: Encoder,
        advance: Callable[[int], None],
    ) -> None:
        """Let one part go through an early round, unless an earlier run did that."""
        path = _ids_file(folder, number, rounds, at)
        mark = path.with_suffix(".json")
        if read_piece(mark, StoredIds, self.report) is not None:
            advance(sum(block.rows for block in blocks))
            return
        stored = store_ids(
            self.table,
            blocks,
            path,
            features=self.features,
            encoder=encoder,
            advance=advance,
        )
        write_piece(mark, stored, {path.name: stored.sha256})

    def _encode_part(
        self,
        folder: Path,
        rounds: int,
        at: int,
        blocks: Sequence[Block],
        split_of: SplitOf,
        counts: PartCounts,
        encoder: Encoder,
        advance: Callable[[int], None],
    ) -> PartRows:
        """Write the rows of one part in the last round."""
        earlier = [_ids_file(folder, number, rounds, at) for number in range(rounds - 1)]
        part = encode_part(
            self.table,
            blocks,
            folder=self.work.path,
            number=at,
            features=self.features,
            numeric=[
                self._stats(counts, c.name).feature(c.name, c.transform, 0)
                for c in self.features.numeric
            ],
            split_of=split_of,
            encoder=encoder,
            earlier=earlier,
            rows_per_group=self.rows_per_group,
            advance=advance,
        )
        files = {
            os.path.relpath(self.work.path / name, folder): part.records[split].sha256
            for split, name in part.files.items()
        }
        write_piece(folder / f"part-{at:05d}.json", part, files)
        for path in earlier:
            path.unlink()
            path.with_suffix(".json").unlink()
        return part

    @staticmethod
    def _stats(counts: PartCounts, name: str) -> NumericStats:
        return counts.numeric.get(name, NumericStats())

    def _describe(
        self,
        index: _IndexState,
        total: int,
        counts: PartCounts,
        ranked: Sequence[Ranked],
        parts: Sequence[PartRows],
    ) -> DatasetInfo:
        categorical = []
        for i, (feature, found) in enumerate(zip(self.features.categorical, ranked)):
            figures = counts.categorical[feature.name]
            length = figures.train_values / counts.rows[0] if feature.multi_valued else 1.0
            categorical.append(
                CategoricalFeature(
                    name=feature.name,
                    num_embeddings=found.kept + FIRST_ID,
                    multi_valued=feature.multi_valued,
                    min_count=feature.min_count,
                    max_length=figures.max_length,
                    mean_length=length,
                    num_raw_values=found.raw_values,
                    frequency_quantiles=found.quantiles,
                    vocabulary=vocabulary_file(feature.name, i),
                    missing=figures.missing,
                )
            )
        splits = {
            split: SplitInfo(
                files=[part.files[split] for part in parts if split in part.files],
                rows=counts.rows[code],
                positives=counts.positives[code],
                unseen_rate=dict(unseen_rates(parts, split)),
            )
            for code, split in enumerate(SPLITS)
        }
        bayes = read_bayes([file.path for file in self.table.files], self.rule)
        return DatasetInfo(
            name=self.name,
            group=self.group,
            numeric=[
                self._stats(counts, c.name)
                .feature(c.name, c.transform, counts.numeric_missing.get(c.name, 0))
                .model_copy(update={"clipped": sum(part.clipped.get(c.name, 0) for part in parts)})
                for c in self.features.numeric
            ],
            categorical=categorical,
            splits=splits,
            split_rule=self.rule.model_dump(),
            raw_rows=total,
            bad_rows=len(counts.bad),
            dropped_rows=counts.dropped,
            sources=index.sources,
            raw_format=self.raw_format,
            versions=versions(),
            bayes=BayesMetrics(**bayes) if bayes else None,
            checksums=self._checksums(ranked, parts),
        )

    def _checksums(
        self, ranked: Sequence[Ranked], parts: Sequence[PartRows]
    ) -> dict[str, FileRecord]:
        found = {
            part.files[split]: part.records[split]
            for split in SPLITS
            for part in parts
            if split in part.files
        }
        for i, (feature, each) in enumerate(zip(self.features.categorical, ranked)):
            assert each.record is not None
            found[vocabulary_file(feature.name, i)] = each.record
        return found


def vocabulary_file(name: str, position: int) -> str:
    """Return the relative path of a feature's vocabulary; odd characters are replaced."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    # The position keeps names apart that differ in odd characters or in case only.
    return f"vocabulary/{position:03d}-{plain[:80]}.parquet"


def _ids_file(folder: Path, number: int, rounds: int, part: int) -> Path:
    """Where round `number` of `rounds` leaves the ids of a part."""
    return folder / f"ids-{number}-{rounds}-{part:05d}.arrow"


def _threads() -> int:
    return max(1, min(pl.thread_pool_size(), 8))
