"""A part of the input as the count pass takes it in where values can be numbered: rows and runs.

One thread reads and numbers blocks, another counts and stores them; a run is written when the first block of
the next one comes to be stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from typing_extensions import Self

from embcomp.data_pipelines.importers.base import Block, RawTable
from embcomp.data_pipelines.preparing.counting import TRAIN, CountedBlock, StoredPart
from embcomp.data_pipelines.preparing.features import Features, flat_values
from embcomp.data_pipelines.preparing.lookup import HashedIds
from embcomp.data_pipelines.preparing.numbered_runs import Numberer, Run
from embcomp.data_pipelines.preparing.stored_rows import RowStore
from embcomp.data_pipelines.schema import NumericFeature


class StoredValues:
    """Numbers the values of a part, counts them and stores its rows; a `ValueSink`.

    Args:
        features: of the dataset.
        known: numeric features whose transforms need no figures of this input, by name.
        partitions: into how many parts values are cut by their hash.
        folder: where the files go.
        prefix: what their names begin with.
        limit: bytes of values that a run holds.
    """

    stored: StoredPart | None = None

    def __init__(
        self,
        *,
        features: Features,
        known: Mapping[str, NumericFeature],
        partitions: int,
        folder: Path,
        prefix: str,
        limit: int,
    ) -> None:
        self.files: dict[str, str] = {}
        self._features = features
        self._partitions = partitions
        self._folder = folder
        self._prefix = prefix
        self._limit = limit
        self._numberer = Numberer()
        self._open: list[Run] = []
        self._rows = RowStore(folder / f"{prefix}.rows", features, known)

    def read(self, table: RawTable, blocks: Sequence[Block]) -> Iterator[CountedBlock]:
        """Yield the rows of blocks; see `ValueSink`."""
        run = self._begin(0)
        coming = table.read(blocks)
        try:
            while True:
                if run.blocks and run.bytes > self._limit:
                    run = self._begin(run.place + 1)
                table.numberings = run.by_name
                found = next(coming, None)
                if found is None:
                    return
                block, rows = found
                frame = self._features.columns(rows.frame)
                yield self._numbered(CountedBlock(block=block, rows=rows, frame=frame), run)
        finally:
            table.numberings = {}

    def _begin(self, place: int) -> Run:
        run = Run(place, self._features.categorical)
        self._open.append(run)
        return run

    def _numbered(self, block: CountedBlock, run: Run) -> CountedBlock:
        texts: dict[int, pl.Series] = {}
        for at, feature in enumerate(self._features.categorical):
            values = block.frame.get_column(feature.name)
            values = flat_values(values) if feature.multi_valued else values
            if feature.hashed:
                block.values[at] = HashedIds().ids(values)
            elif values.dtype == pl.UInt32:
                block.values[at] = values.to_numpy()
            else:
                texts[at] = values
        block.values |= self._numberer.number(run, texts)
        block.run = run.place
        run.blocks += 1
        return block

    def take(self, block: CountedBlock, splits: NDArray[np.int8]) -> None:
        """Count and store the rows of a block; see `ValueSink`."""
        while self._open[0].place < block.run:
            self._write(self._open.pop(0))
        is_train = splits == TRAIN
        for at, numbering in self._open[0].numberings.items():
            counted = is_train
            if self._features.categorical[at].multi_valued:
                counted = np.repeat(is_train, block.lengths(self._features.categorical[at].name))
            numbering.count(block.values[at], counted)
        self._rows.add(block, splits)

    def _write(self, run: Run) -> None:
        name = f"{self._prefix}-{run.place:03d}.arrow"
        self.files[name] = run.write(self._folder / name, self._partitions)

    def flush(self) -> None:
        """Write the last runs; the rows are whole then."""
        for run in self._open:
            if run.blocks:
                self._write(run)
        self._rows.close()
        self.stored = StoredPart(
            rows=self._rows.path.name, sha256=self._rows.sha256, runs=list(self.files)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._numberer.close()
        self._rows.close()
        for run in self._open:
            run.close()
