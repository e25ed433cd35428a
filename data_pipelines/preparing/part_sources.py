"""Where the encode pass takes a part from: the raw input, or what the count pass stored of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embcomp.data_pipelines.importers.base import WEIGHT, Block, RawTable
from embcomp.data_pipelines.loader.prefetch import ahead
from embcomp.data_pipelines.preparing.counting import SplitOf
from embcomp.data_pipelines.preparing.encoding import EncodedBlock, Encoder, Ids, merged_rounds
from embcomp.data_pipelines.preparing.features import Features
from embcomp.data_pipelines.preparing.numbered_runs import run_values
from embcomp.data_pipelines.preparing.stored_rows import read_stored
from embcomp.data_pipelines.schema import MISSING_ID, NumericFeature
from embcomp.data_pipelines.transforms import Transforms


@dataclass(frozen=True, kw_only=True)
class RawPart:
    """A part of the input, read once more; a `PartSource` whose pieces are blocks.

    Attributes:
        table: the raw input.
        blocks: of the part.
        features: of the dataset.
        split_of: gives the split of each usable row of a block.
    """

    table: RawTable
    blocks: Sequence[Block]
    features: Features
    split_of: SplitOf

    def found_ids(self, encoder: Encoder, advance: Callable[[int], None]) -> Iterator[Ids]:
        """Yield what an early round finds of each block; see `PartSource`."""
        with self.table.for_part() as table:
            for block, rows in ahead(table.read(self.blocks)):
                yield encoder.ids(self.features.columns(rows.frame))
                advance(block.rows)

    def encoded(
        self, encoder: Encoder, earlier: Sequence[Iterator[Ids]], numeric: Sequence[NumericFeature]
    ) -> Iterator[EncodedBlock]:
        """Yield the rows of each block; see `PartSource`."""
        told = ["label", WEIGHT] if self.features.weighted else ["label"]
        transforms = Transforms(numeric)
        with self.table.for_part() as table:
            for block, rows in ahead(table.read(self.blocks)):
                frame = self.features.columns(rows.frame)
                found = merged_rounds(encoder.ids(frame), earlier)
                numbers, clipped = transforms.apply(frame)
                yield EncodedBlock(
                    read=block.rows,
                    splits=self.split_of(block, rows),
                    told=[frame.get_column(name).to_numpy() for name in told],
                    numbers=numbers,
                    clipped=clipped,
                    ids=[found[at] for at in range(len(self.features.categorical))],
                    lengths={
                        at: frame.get_column(feature.name).list.len().to_numpy()
                        for at, feature in enumerate(self.features.categorical)
                        if feature.multi_valued
                    },
                )


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """What the count pass stored of a part; a `PartSource` whose pieces are runs.

    Attributes:
        rows: the file of its rows.
        runs: the files of its values, which number them.
        partitions: into how many parts a run's values are cut by their hash.
        features: of the dataset.
        size: how many rows the part has in the input.
    """

    rows: Path
    runs: Sequence[Path]
    partitions: int
    features: Features
    size: int

    def found_ids(self, encoder: Encoder, advance: Callable[[int], None]) -> Iterator[Ids]:
        """Yield what an early round finds of each run; see `PartSource`."""
        for run in self.runs:
            yield self._ids_of(run, encoder)
        advance(self.size)

    def encoded(
        self, encoder: Encoder, earlier: Sequence[Iterator[Ids]], numeric: Sequence[NumericFeature]
    ) -> Iterator[EncodedBlock]:
        """Yield the rows of each block; see `PartSource`."""
        runs = iter(self.runs)
        at, ids = -1, dict[int, NDArray[np.int32]]()
        for block in ahead(read_stored(self.rows, self.features, numeric)):
            if block.run != at:
                at, ids = block.run, merged_rounds(self._ids_of(next(runs), encoder), earlier)
            yield EncodedBlock(
                read=block.read,
                splits=block.splits,
                told=block.told,
                numbers=block.numbers,
                clipped=block.clipped,
                # Ids that are hashes of values were stored as they are.
                ids=[
                    values if feature.hashed else ids[place].take(values)
                    for place, (feature, values) in enumerate(
                        zip(self.features.categorical, block.values)
                    )
                ],
                lengths=block.lengths,
            )

    def _ids_of(self, run: Path, encoder: Encoder) -> Ids:
        """Return the ids that a round finds of a run's values, by their numbers; 0 is missing."""
        places = [at for at in encoder.places if not self.features.categorical[at].hashed]
        values = {at: run_values(run, at, self.partitions) for at in places}
        found = encoder.ids_of({at: texts for at, (texts, _) in values.items()})
        by_number = {}
        for at, (_, numbers) in values.items():
            by_number[at] = np.full(len(numbers) + 1, MISSING_ID, dtype=np.int32)
            by_number[at][numbers] = found[at]
        return by_number
