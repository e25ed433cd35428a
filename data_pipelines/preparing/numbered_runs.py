"""Counts of numbered values: a run for as many as there is room for, and numbers from 1 on in each.

A run's file holds values by hash partition, as merging wants them, and beside each its number, by which the
rows that were stored with the run name it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from embcomp.data_pipelines.numbering import Numbering
from embcomp.data_pipelines.preparing.counting import cut_by_hash, read_batch
from embcomp.data_pipelines.preparing.features import Feature
from embcomp.io.digests import HashedFile

_SCHEMA = pa.schema([("value", pa.large_string()), ("count", pa.int64()), ("number", pa.uint32())])
Numbers = NDArray[np.uint32]


class Run:
    """The numbered values of some consecutive blocks.

    Attributes:
        place: how many runs the part had before.
        blocks: how many blocks it numbers.
        numberings: of each feature that is not hashed, by its place.
    """

    def __init__(self, place: int, features: Sequence[Feature]) -> None:
        self.place = place
        self.blocks = 0
        self.numberings = {at: Numbering() for at, each in enumerate(features) if not each.hashed}
        self._features = features

    @property
    def by_name(self) -> dict[str, Numbering]:
        """The numberings of features whose values are texts of a row, which a table may use."""
        found = ((self._features[at], numbering) for at, numbering in self.numberings.items())
        return {
            feature.name: numbering
            for feature, numbering in found
            if not (feature.multi_valued or feature.bucketed)
        }

    @property
    def bytes(self) -> int:
        """What the values take."""
        return sum(each.bytes for each in self.numberings.values())

    def write(self, path: Path, partitions: int) -> str:
        """Write one record batch per feature and hash partition, and let go of the values.

        Returns:
            The file's SHA-256.
        """
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with HashedFile(path) as file, pa.ipc.new_file(file, _SCHEMA, options=options) as writer:
            for at in range(len(self._features)):
                for part in cut_by_hash(self._take(at), partitions):
                    table = part.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(_SCHEMA)
                    columns = [column.combine_chunks() for column in table.columns]
                    writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        return file.sha256

    def _take(self, feature: int) -> pl.DataFrame:
        numbering = self.numberings.pop(feature, None)
        if numbering is None:
            return pl.DataFrame(schema={"value": pl.String, "count": pl.Int64, "number": pl.UInt32})
        values, counts = numbering.values()
        numbering.close()
        numbers = np.arange(1, len(counts) + 1, dtype=np.uint32)
        return pl.DataFrame({"value": pl.from_arrow(values), "count": counts, "number": numbers})

    def close(self) -> None:
        """Let go of values that no file will have."""
        for each in self.numberings.values():
            each.close()


class Numberer:
    """Numbers what a table left as texts, several features at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max(1, min(pl.thread_pool_size(), 8)))

    def number(self, run: Run, texts: Mapping[int, pl.Series]) -> dict[int, Numbers]:
        """Return the (N,) numbers of each feature's N values (String)."""
        found = self._pool.map(lambda item: run.numberings[item[0]].number(item[1]), texts.items())
        return dict(zip(texts, found))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def run_values(path: Path, feature: int, partitions: int) -> tuple[pl.Series, Numbers]:
    """Return the (N,) values of a feature in a run, in any order, and (N,) their numbers."""
    frame = pl.concat(
        [read_batch(path, feature * partitions + partition) for partition in range(partitions)]
    )
    return frame["value"], frame["number"].to_numpy()
