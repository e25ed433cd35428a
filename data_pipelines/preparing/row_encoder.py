"""Further rows of a prepared dataset: encoded by its vocabularies and figures, and not counted.

What is seen in a row is what `prepare` would have written of it, to the bit: a value that the
vocabulary lacks is id 1, a missing one id 0, and numbers go through the transform whose figures came
from the train split.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embcomp.data_pipelines.importers.base import (
    WEIGHT,
    BadRow,
    Block,
    Layout,
    NumericColumn,
    RawTable,
    Rows as ReadRows,
)
from embcomp.data_pipelines.loader.prefetch import ahead
from embcomp.data_pipelines.loader.row_groups import Bags, Columns
from embcomp.data_pipelines.preparing.encoding import Encoder, Slice
from embcomp.data_pipelines.preparing.features import Feature, Features
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.schema import UNSEEN_ID, DatasetInfo
from embcomp.data_pipelines.splits import exact
from embcomp.data_pipelines.transforms import numeric_expression
from embcomp.errors import DataError

SHOWN_BAD_ROWS = 5


class RowEncoder:
    """Turns columns of the importers' common shape into what a model takes.

    The indices of all vocabularies are in memory together, at some 22 bytes a value.

    Args:
        info: a dataset with vocabularies, or an artefact's description of one.
        threads: how many features are looked up at a time.
    """

    def __init__(self, info: DatasetInfo, threads: int = 1) -> None:
        self._info = info
        self._threads = threads
        self._vocabularies = [
            Path()
            if feature.is_hashed or feature.holds_ids
            else _vocabulary(info, feature.name, feature.vocabulary)
            for feature in info.categorical
        ]
        self._transforms = [numeric_expression(feature) for feature in info.numeric]

    @cached_property
    def _encoder(self) -> Encoder:
        # Built when rows come: until then, what is wrong with the raw files can be said at once.
        slices = [
            Slice(
                feature=at,
                start=0,
                stop=0
                if feature.is_hashed or feature.holds_ids
                else pq.read_metadata(path).num_rows,
            )
            for at, (feature, path) in enumerate(zip(self._info.categorical, self._vocabularies))
        ]
        return Encoder(self.features(()), self._vocabularies, slices, self._threads)

    def features(self, bucketed: Collection[str], *, weighted: bool = False) -> Features:
        """The dataset's features, some of which are numbers in the raw rows, and perhaps weights."""
        return Features(
            weighted=weighted,
            numeric=tuple(NumericColumn(name=name) for name in self._info.numeric_names),
            categorical=tuple(
                Feature(
                    name=feature.name,
                    multi_valued=feature.multi_valued,
                    min_count=feature.min_count,
                    bucketed=feature.name in bucketed,
                    hashed=feature.is_hashed,
                    num_embeddings=feature.num_embeddings if feature.holds_ids else None,
                )
                for feature in self._info.categorical
            ),
        )

    def features_of(self, layout: Layout, place: str) -> Features:
        """Find the dataset's features in a raw table: a number may be a bucketed category.

        Args:
            place: what has the layout, for the error.
        """
        numbers = [column.name for column in layout.numeric]
        bags = {column.name: column.multi_valued for column in layout.categorical}
        for name in self._info.numeric_names:
            if name not in numbers:
                raise DataError(_lacks(place, f"numeric feature {name!r}", layout))
        for feature in self._info.categorical:
            if feature.name in numbers and not feature.multi_valued:
                continue
            if feature.name not in bags:
                raise DataError(_lacks(place, f"categorical feature {feature.name!r}", layout))
            if bags[feature.name] != feature.multi_valued:
                wanted = "several values" if feature.multi_valued else "one value"
                raise DataError(
                    f"{place}: feature {feature.name!r} has {wanted} a row in the dataset "
                    f"{self._info.name!r}, which is not how its rows are read here"
                )
        return self.features(numbers, weighted=layout.weight is not None)

    def encode(self, frame: pl.DataFrame, features: Features) -> Columns:
        """Encode rows.

        Args:
            frame: columns of the common shape, a label among them, which may be null.
            features: what `features_of` found.

        Returns:
            The rows; a label is NaN where there is none, and so is a weight.
        """
        frame = features.columns(frame)
        found = self._encoder.ids(frame)
        numbers = frame.select(self._transforms).get_columns() if self._transforms else []
        columns = Columns(
            labels=_nan_where_null(frame.get_column("label")),
            weights=_nan_where_null(frame.get_column(WEIGHT)) if features.weighted else None,
            dense=[column.to_numpy() for column in numbers],
            ids=[],
            bags=[],
        )
        for at, feature in enumerate(features.categorical):
            if not feature.multi_valued:
                columns.ids.append(found[at])
                continue
            lengths = frame.get_column(feature.name).list.len().fill_null(0).to_numpy()
            offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
            np.cumsum(lengths, out=offsets[1:])
            columns.bags.append(Bags(offsets, found[at]))
        return columns


def _nan_where_null(column: pl.Series) -> NDArray[np.float32]:
    return column.cast(pl.Float32).fill_null(math.nan).to_numpy()


def _vocabulary(info: DatasetInfo, name: str, file: str) -> Path:
    if not file:
        raise DataError(
            f"{info.folder}: feature {name!r} has no vocabulary, so that raw values have no ids; "
            f"prepare the rows with `embcomp prepare`, train on that and export again"
        )
    return info.folder / file


def _lacks(place: str, what: str, layout: Layout) -> str:
    return (
        f"{place} gives no {what}, which the dataset has; it gives {', '.join(layout.names)}. Name "
        f"the raw format that the dataset was prepared from"
    )


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """Rows of one block.

    Attributes:
        start: the number of the block's first row in the input, from 0.
        size: how many rows the block has.
        offsets: (n,) int64, where in the block the usable rows are.
        columns: those rows.
    """

    start: int
    size: int
    offsets: NDArray[np.int64]
    columns: Columns


@dataclass(kw_only=True)
class RowStream:
    """The encoded rows of raw files, block after block, and what was found on the way.

    Attributes:
        encoder: encodes them.
        table: the opened files.
        features: the dataset's features in it.
        blocks: what the files consist of.
        total: how many rows there are, or are wanted.
        max_bad_rows: the share of malformed rows above which reading ends with an error.
        bad: how many rows were malformed.
        first_bad: the first of them.
        unseen: for each feature, how many values of usable rows had id 1, and how many there were.
    """

    encoder: RowEncoder
    table: RawTable
    features: Features
    blocks: list[Block]
    total: int
    max_bad_rows: float
    bad: int = 0
    first_bad: list[BadRow] = field(default_factory=list)
    unseen: dict[str, list[int]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[EncodedRows]:
        self.bad, self.first_bad = 0, []
        self.unseen = {feature.name: [0, 0] for feature in self.features.categorical}
        try:
            for block, rows in ahead(self.table.read(self.blocks)):
                size = min(block.rows, self.total - block.row)
                offsets, frame = _wanted(rows, block, size)
                self._count_bad(row for row in rows.bad if row.line - block.line < size)
                columns = self.encoder.encode(frame, self.features)
                self._count_unseen(columns)
                yield EncodedRows(start=block.row, size=size, offsets=offsets, columns=columns)
        finally:
            self.table.close()

    def _count_bad(self, rows: Iterable[BadRow]) -> None:
        for row in rows:
            self.bad += 1
            if len(self.first_bad) < SHOWN_BAD_ROWS:
                self.first_bad.append(row)
        if self.bad > math.floor(exact(self.max_bad_rows) * self.total):
            shown = "\n".join(f"  {row}" for row in self.first_bad)
            raise DataError(
                f"at least {self.bad} of {self.total} rows are malformed, more than the share of "
                f"{self.max_bad_rows:g} that is allowed; the first:\n{shown}\nIf the format is the "
                f"right one, mend the rows or allow a larger share (--max-bad-rows): those that are "
                f"allowed get no score"
            )

    def _count_unseen(self, columns: Columns) -> None:
        ids, bags = iter(columns.ids), iter(columns.bags)
        for feature in self.features.categorical:
            values = next(bags).values if feature.multi_valued else next(ids)
            counts = self.unseen[feature.name]
            counts[0] += int(np.count_nonzero(values == UNSEEN_ID))
            counts[1] += len(values)


def _wanted(rows: ReadRows, block: Block, size: int) -> tuple[NDArray[np.int64], pl.DataFrame]:
    """The offsets of usable rows among the first `size` of a block, and these rows."""
    whole = np.arange(block.rows) if rows.positions is None else rows.positions
    offsets = np.asarray(whole, dtype=np.int64)
    count = int(np.searchsorted(offsets, size))
    return offsets[:count], rows.frame.head(count)


def index_rows(table: RawTable, limit: int | None, *, progress: bool) -> tuple[list[Block], int]:
    """Cut raw files into blocks, as far as they are wanted.

    Args:
        limit: how many rows are wanted; None means all.

    Returns:
        The blocks, and how many rows of them are wanted.
    """
    table.row_limit = limit
    blocks: list[Block] = []
    row = 0
    size = sum(file.path.stat().st_size for file in table.files)
    with phase("index", size, show=progress) as advance:
        for number in range(len(table.files)):
            if limit is not None and row >= limit:
                break
            blocks += table.index(number, row, advance).blocks
            row = blocks[-1].row + blocks[-1].rows if blocks else 0
    if limit is not None and row > limit:
        row = limit
        blocks = [block for block in blocks if block.row < limit]
    if not row:
        raise DataError(f"{table.files[0].path} has no rows")
    return blocks, row
