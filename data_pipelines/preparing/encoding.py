"""The second pass: values become ids, numbers go through their transforms, rows go to their split.

When the indices of all features do not fit in memory at once, the input is read in several rounds;
each but the last leaves the ids that it found on disk, and the last puts all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from embcomp.data_pipelines.preparing.features import Feature, Features, flat_values
from embcomp.data_pipelines.preparing.given_ids import GivenIds
from embcomp.data_pipelines.preparing.lookup import BYTES_PER_VALUE, HashedIds, ValueIndex
from embcomp.data_pipelines.preparing.row_writer import RowGroupWriter
from embcomp.data_pipelines.sample_weights import WEIGHT_COLUMN
from embcomp.data_pipelines.schema import UNSEEN_ID, FileRecord, NumericFeature
from embcomp.data_pipelines.splits import SPLITS
from embcomp.io.atomic_files import atomic_path
from embcomp.io.digests import HashedFile


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Rows `start` <= row < `stop` of a feature's vocabulary."""

    feature: int
    start: int
    stop: int


class PartRows(BaseModel):
    """What the second pass wrote for one part: by split a file, what it is, and id 1's share.

    `clipped` counts, by numeric feature, the values that its transform cannot represent.
    """

    files: dict[str, str] = Field(default_factory=dict)
    records: dict[str, FileRecord] = Field(default_factory=dict)
    values: dict[str, dict[str, int]] = Field(default_factory=dict)
    unseen: dict[str, dict[str, int]] = Field(default_factory=dict)
    clipped: dict[str, int] = Field(default_factory=dict)


class StoredIds(BaseModel):
    """The digest of what an early round wrote for one part."""

    sha256: str


def plan_rounds(sizes: Sequence[int], limit: int) -> list[list[Slice]]:
    """Pack the vocabularies into rounds whose indices take at most `limit` bytes each."""
    room = max(1, limit // BYTES_PER_VALUE)
    rounds: list[list[Slice]] = [[]]
    left = room
    for feature, size in enumerate(sizes):
        start = 0
        while start < size or start == 0:
            if left == 0:
                rounds.append([])
                left = room
            stop = min(size, start + left)
            rounds[-1].append(Slice(feature=feature, start=start, stop=stop))
            left -= stop - start
            start = stop
            if size == 0:
                break
    return rounds


class Encoder:
    """Ids of the features of one round."""

    def __init__(
        self,
        features: Features,
        vocabularies: Sequence[Path],
        slices: Sequence[Slice],
        threads: int,
    ) -> None:
        self._features = features
        self._slices = list(slices)
        self._indices = [
            _index(features.categorical[s.feature], vocabularies[s.feature], s) for s in slices
        ]
        self._pool = ThreadPoolExecutor(threads)

    def close(self) -> None:
        """End the threads that look up."""
        self._pool.shutdown()

    @property
    def places(self) -> list[int]:
        """The features that this round has a part of."""
        return [each.feature for each in self._slices]

    def ids(self, frame: pl.DataFrame) -> dict[int, np.ndarray]:
        """Return int32 ids by feature: (B,), or (N,) of all bags in a row when multi-valued."""
        categorical = self._features.categorical
        return self.ids_of({at: self._values(frame, categorical[at]) for at in self.places})

    def ids_of(self, values: Mapping[int, pl.Series]) -> dict[int, np.ndarray]:
        """Return the (N,) int32 ids of N values (String) of each of some features."""
        indices = [index for at, index in zip(self.places, self._indices) if at in values]
        places = [at for at in self.places if at in values]
        found = self._pool.map(lambda pair: pair[0].ids(values[pair[1]]), zip(indices, places))
        return dict(zip(places, found))

    @staticmethod
    def _values(frame: pl.DataFrame, feature: Feature) -> pl.Series:
        column = frame.get_column(feature.name)
        if feature.multi_valued:
            return flat_values(column)
        return column


def _index(feature: Feature, vocabulary: Path, rows: Slice) -> HashedIds | GivenIds | ValueIndex:
    if feature.hashed:
        return HashedIds()
    if feature.num_embeddings is not None:
        return GivenIds(feature.name, feature.num_embeddings)
    return ValueIndex(vocabulary, rows.start, rows.stop)


def dataset_schema(features: Features) -> pa.Schema:
    """Return the columns of the dataset's Parquet files."""
    names = ["label", WEIGHT_COLUMN] if features.weighted else ["label"]
    fields = [pa.field(name, pa.float32(), nullable=False) for name in names]
    fields += [pa.field(c.name, pa.float32(), nullable=False) for c in features.numeric]
    for f in features.categorical:
        kind = pa.list_(pa.field("element", pa.int32(), nullable=False))
        fields.append(pa.field(f.name, kind if f.multi_valued else pa.int32(), nullable=False))
    return pa.schema(fields)


@dataclass(frozen=True, kw_only=True)
class EncodedBlock:
    """Encoded rows of a block, B of them.

    Attributes:
        read: how many rows the block has, malformed ones included.
        splits: (B,) int8.
        told: (B,) float32 labels, and weights where there are any.
        numbers: (B,) float32 of each numeric feature.
        clipped: how many raw values the transforms cannot represent, by feature.
        ids: for each categorical feature (B,) int32, or those of all bags in a row.
        lengths: (B,) of each multi-valued feature's bags, by its place.
    """

    read: int
    splits: NDArray[np.int8]
    told: Sequence[NDArray[np.float32]]
    numbers: Sequence[NDArray[np.float32]]
    clipped: Mapping[str, int]
    ids: Sequence[NDArray[np.int32]]
    lengths: Mapping[int, NDArray[np.int64]]

    def rows_of(self, split: int) -> EncodedBlock:
        """Return the rows of a split, in memory of their own: few rows would else keep many."""
        (rows,) = np.nonzero(self.splits == split)
        if len(rows) == len(self.splits):
            return self
        ids, lengths = [], {}
        for at, values in enumerate(self.ids):
            if at not in self.lengths:
                ids.append(values.take(rows))
                continue
            lengths[at] = self.lengths[at].take(rows)
            ids.append(values[np.repeat(self.splits == split, self.lengths[at])])
        return EncodedBlock(
            read=self.read,
            splits=self.splits.take(rows),
            told=[column.take(rows) for column in self.told],
            numbers=[column.take(rows) for column in self.numbers],
            clipped=self.clipped,
            ids=ids,
            lengths=lengths,
        )


Ids = Mapping[int, NDArray[np.int32]]
"""Ids that a round found, by the feature's place."""


class PartSource(Protocol):
    """A part of the input, to be encoded."""

    def found_ids(self, encoder: Encoder, advance: Callable[[int], None]) -> Iterator[Ids]:
        """Yield what an early round finds, piece by piece."""

    def encoded(
        self, encoder: Encoder, earlier: Sequence[Iterator[Ids]], numeric: Sequence[NumericFeature]
    ) -> Iterator[EncodedBlock]:
        """Yield the rows of each block.

        Args:
            encoder: of the last round.
            earlier: what each round before found, in the same pieces.
            numeric: the numeric features, with the figures of their transforms.
        """


def merged_rounds(found: Ids, earlier: Sequence[Iterator[Ids]]) -> dict[int, NDArray[np.int32]]:
    """Put together what all rounds found of a piece."""
    merged = dict(found)
    for more in earlier:
        for at, ids in next(more).items():
            # A value is in one slice only; the others say 1, which is less than its id.
            merged[at] = np.maximum(merged[at], ids) if at in merged else ids
    return merged


def store_ids(
    source: PartSource, path: Path, *, encoder: Encoder, advance: Callable[[int], None]
) -> StoredIds:
    """Write the ids of an early round for one part: a stream of one list per feature and piece."""
    schema = pa.schema([("feature", pa.int32()), ("ids", pa.list_(pa.int32()))])
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        atomic_path(path, durable=False) as temporary,
        HashedFile(temporary) as file,
        pa.ipc.new_file(file, schema, options=options) as writer,
    ):
        for found in source.found_ids(encoder, advance):
            offsets = np.cumsum([0, *(len(ids) for ids in found.values())])
            flat = np.concatenate([*found.values(), np.empty(0, dtype=np.int32)])
            lists = pa.ListArray.from_arrays(
                pa.array(offsets, pa.int32()), pa.array(flat, pa.int32())
            )
            writer.write_batch(pa.record_batch([pa.array(list(found), pa.int32()), lists], schema))
    return StoredIds(sha256=file.sha256)


def _stored(path: Path, stack: ExitStack) -> Iterator[Ids]:
    reader = pa.ipc.open_file(stack.enter_context(path.open("rb")))
    for batch in range(reader.num_record_batches):
        columns = reader.get_batch(batch)
        features = columns.column("feature").to_pylist()
        lists = columns.column("ids")
        yield {f: lists[i].values.to_numpy(zero_copy_only=False) for i, f in enumerate(features)}


def encode_part(
    source: PartSource,
    *,
    folder: Path,
    number: int,
    features: Features,
    numeric: Sequence[NumericFeature],
    encoder: Encoder,
    earlier: Sequence[Path],
    rows_per_group: int,
    advance: Callable[[int], None],
) -> PartRows:
    """Write the Parquet files of one part.

    Args:
        earlier: the files of ids that the earlier rounds left for this part.
    """
    schema = dataset_schema(features)
    part = PartRows()
    with ExitStack() as stack:
        stored = [_stored(path, stack) for path in earlier]
        writers: dict[str, RowGroupWriter] = {}
        positives: dict[str, int] = {}
        for block in source.encoded(encoder, stored, numeric):
            for name, count in block.clipped.items():
                part.clipped[name] = part.clipped.get(name, 0) + count
            for code in np.unique(block.splits).tolist():
                split = SPLITS[code]
                if split not in writers:
                    name = f"{split}-{number:05d}.parquet"
                    writers[split] = stack.enter_context(
                        RowGroupWriter(folder / name, schema, rows_per_group)
                    )
                    part.files[split] = name
                    positives[split] = 0
                mine = block.rows_of(code)
                writers[split].write(_table(mine, schema))
                positives[split] += int(mine.told[0].sum(dtype=np.float64))
                _count_unseen(part, split, mine, features)
            advance(block.read)
    part.records = {split: writers[split].record(positives[split]) for split in writers}
    return part


def _table(block: EncodedBlock, schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(column, pa.float32()) for column in (*block.told, *block.numbers)]
    kinds = schema.types[len(arrays) :]
    for at, (ids, kind) in enumerate(zip(block.ids, kinds)):
        flat = pa.array(ids, pa.int32())
        if at not in block.lengths:
            arrays.append(flat)
            continue
        offsets = np.zeros(len(block.lengths[at]) + 1, dtype=np.int32)
        np.cumsum(block.lengths[at], out=offsets[1:])
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind))
    return pa.Table.from_arrays(arrays, schema=schema)


def _count_unseen(part: PartRows, split: str, rows: EncodedBlock, features: Features) -> None:
    values = part.values.setdefault(split, {})
    unseen = part.unseen.setdefault(split, {})
    for feature, ids in zip(features.categorical, rows.ids):
        values[feature.name] = values.get(feature.name, 0) + len(ids)
        unseen[feature.name] = unseen.get(feature.name, 0) + int(np.count_nonzero(ids == UNSEEN_ID))


def unseen_rates(parts: Sequence[PartRows], split: str) -> Mapping[str, float]:
    """Return, by feature, the share of a split's values that got id 1."""
    values: dict[str, int] = {}
    unseen: dict[str, int] = {}
    for part in parts:
        for name, count in part.values.get(split, {}).items():
            values[name] = values.get(name, 0) + count
            unseen[name] = unseen.get(name, 0) + part.unseen[split][name]
    return {name: unseen[name] / count if count else 0.0 for name, count in values.items()}
