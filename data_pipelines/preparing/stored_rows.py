"""Rows as the count pass leaves them for the encode pass, so that no text is read twice.

A block is an Arrow stream of one record batch: the split of each row, label and weight, numbers that went
through their transform (float32) or wait for its figures (float64), and for each categorical feature the
numbers that its values have in a run, or their ids where these are hashes. Blocks follow each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from embcomp.data_pipelines.importers.base import WEIGHT
from embcomp.data_pipelines.preparing.counting import CountedBlock
from embcomp.data_pipelines.preparing.features import Features
from embcomp.data_pipelines.schema import NumericFeature
from embcomp.data_pipelines.transforms import Transforms
from embcomp.io.digests import HashedFile

_SPLIT = "split"
_NUMBER_TYPES = (np.uint8, np.uint16, np.uint32)


@dataclass(frozen=True, kw_only=True)
class StoredBlock:
    """The usable rows of a block, B of them.

    Attributes:
        read: how many rows the block has, malformed ones included.
        run: which run of the part numbers their values.
        splits: (B,) int8.
        told: (B,) float32 labels, and weights where there are any.
        numbers: (B,) float32 of each numeric feature.
        clipped: how many raw values the transforms cannot represent, by feature.
        values: for each categorical feature (N,) numbers, or int32 ids where these are hashes.
        lengths: (B,) of each multi-valued feature's bags, by its place.
    """

    read: int
    run: int
    splits: NDArray[np.int8]
    told: Sequence[NDArray[np.float32]]
    numbers: Sequence[NDArray[np.float32]]
    clipped: Mapping[str, int]
    values: Sequence[NDArray[Any]]
    lengths: Mapping[int, NDArray[np.int64]]


class RowStore:
    """Writes the rows of a part.

    Args:
        path: the file.
        features: of the dataset.
        known: numeric features whose transforms need no figures of this input, by name.
    """

    def __init__(self, path: Path, features: Features, known: Mapping[str, NumericFeature]) -> None:
        self.path = path
        self._features = features
        self._known = Transforms([known[c.name] for c in features.numeric if c.name in known])
        self._file = HashedFile(path)

    def add(self, block: CountedBlock, splits: NDArray[np.int8]) -> None:
        """Write the rows of a block, given the (B,) splits of its rows."""
        columns: dict[str, pa.Array] = {_SPLIT: pa.array(splits)}
        for name in ["label", *([WEIGHT] if self._features.weighted else [])]:
            columns[name] = pa.array(block.frame.get_column(name).to_numpy(), pa.float32())
        numbers, clipped = self._known.apply(block.frame)
        ready = dict(zip((feature.name for feature in self._known.features), numbers))
        for column in self._features.numeric:
            raw, found = block.frame.get_column(column.name), ready.get(column.name)
            columns[_numeric(column.name)] = raw.to_arrow() if found is None else pa.array(found)
        for at, feature in enumerate(self._features.categorical):
            lengths = block.lengths(feature.name) if feature.multi_valued else None
            columns[_categorical(feature.name)] = _array(block.values[at], lengths)
        told = {"run": block.run, "read": block.block.rows, "clipped": clipped}
        batch = pa.record_batch(columns).replace_schema_metadata({"told": json.dumps(told)})
        with pa.ipc.new_stream(self._file, batch.schema) as stream:
            stream.write_batch(batch)

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._file.sha256

    def close(self) -> None:
        """End the file."""
        self._file.close()


def _array(values: NDArray[np.generic], lengths: NDArray[np.generic] | None) -> pa.Array:
    """Numbers in as few bytes as their largest one needs; ids, which are signed, as they are."""
    if values.dtype == np.uint32:
        most = int(values.max()) if len(values) else 0
        kind = next(each for each in _NUMBER_TYPES if most <= np.iinfo(each).max)
        values = values.astype(kind)
    flat = pa.array(values)
    if lengths is None:
        return flat
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def read_stored(
    path: Path, features: Features, numeric: Sequence[NumericFeature]
) -> Iterator[StoredBlock]:
    """Yield the blocks of a part.

    Args:
        path: the file that a `RowStore` wrote.
        features: of the dataset.
        numeric: the numeric features, with the figures of their transforms.
    """
    late: Transforms | None = None
    with pa.OSFile(str(path)) as file:
        size = file.size()
        while file.tell() < size:
            with pa.ipc.open_stream(file) as stream:
                (batch,) = stream
            if late is None:
                waits = pa.float64()
                late = Transforms([n for n in numeric if batch[_numeric(n.name)].type == waits])
            yield _block(batch, features, numeric, late)


def _block(
    batch: pa.RecordBatch,
    features: Features,
    numeric: Sequence[NumericFeature],
    late: Transforms,
) -> StoredBlock:
    told = json.loads(batch.schema.metadata[b"told"])
    raw = {each.name: batch[_numeric(each.name)] for each in late.features}
    found, clipped = late.apply(pl.DataFrame({n: pl.from_arrow(each) for n, each in raw.items()}))
    ready = dict(zip(raw, found))
    values, lengths = [], {}
    for at, feature in enumerate(features.categorical):
        column = batch[_categorical(feature.name)]
        if feature.multi_valued:
            lengths[at] = np.diff(column.offsets.to_numpy())
            column = column.flatten()
        values.append(column.to_numpy())
    names = ["label", *([WEIGHT] if features.weighted else [])]
    return StoredBlock(
        read=told["read"],
        run=told["run"],
        splits=batch[_SPLIT].to_numpy(),
        told=[batch[name].to_numpy() for name in names],
        numbers=[
            ready[each.name] if each.name in ready else batch[_numeric(each.name)].to_numpy()
            for each in numeric
        ],
        clipped=told["clipped"] | clipped,
        values=values,
        lengths=lengths,
    )


def _numeric(name: str) -> str:
    """The column of a numeric feature, whose name may be any."""
    return f"n {name}"


def _categorical(name: str) -> str:
    return f"c {name}"
