"""Read a split's Parquet row groups as columns, and check them against `dataset.json`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embcomp.data_pipelines.integrity import UNREADABLE
from embcomp.data_pipelines.sample_weights import EXPECTED, are_weights
from embcomp.data_pipelines.schema import CategoricalFeature, DatasetInfo
from embcomp.errors import DataError, one_line
from embcomp.io.remote_paths import arrow_input


@dataclass(frozen=True)
class Bags:
    """A multi-valued column: row i holds `values[offsets[i] : offsets[i + 1]]`."""

    offsets: NDArray[np.int64]
    values: NDArray[np.int32]

    def slice(self, start: int, stop: int) -> Bags:
        """Return rows `start` to `stop`, the last one excluded."""
        offsets = self.offsets[start : stop + 1]
        return Bags(offsets - offsets[0], self.values[offsets[0] : offsets[-1]])


@dataclass(frozen=True)
class Columns:
    """Consecutive rows by column, as views on what Arrow decoded.

    Attributes:
        labels: (n,) float32.
        dense: I arrays of (n,) float32.
        ids: one (n,) int32 array per single-valued feature.
        bags: one `Bags` per multi-valued feature.
        weights: (n,) float32, if rows have weights.
    """

    labels: NDArray[np.float32]
    dense: list[NDArray[np.float32]]
    ids: list[NDArray[np.int32]]
    bags: list[Bags]
    weights: NDArray[np.float32] | None = None

    def slice(self, start: int, stop: int) -> Columns:
        """Return rows `start` to `stop`, the last one excluded."""
        return Columns(
            labels=self.labels[start:stop],
            dense=[column[start:stop] for column in self.dense],
            ids=[column[start:stop] for column in self.ids],
            bags=[bags.slice(start, stop) for bags in self.bags],
            weights=None if self.weights is None else self.weights[start:stop],
        )


@dataclass(frozen=True)
class _Location:
    """Rows of a row group: its file, its place there, and which of the file's rows are wanted."""

    file: Path
    index: int
    first_row: int
    skipped: int
    rows: int


class RowGroups:
    """The row groups of one split, in row order.

    Opening reads only the files' footers and checks columns, types and row counts; `read` decodes
    one row group and checks every value that a model could choke on.

    Args:
        info: the dataset.
        split: one of its splits.
        part: from which share of the split's rows to which; `(0, 0.9)` leaves the last tenth out.
    """

    def __init__(
        self, info: DatasetInfo, split: str, part: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        self.info = info
        self.split = split
        self.single = [feature for feature in info.categorical if not feature.multi_valued]
        self.multi = [feature for feature in info.categorical if feature.multi_valued]
        self._columns = info.column_names
        self._metadata: dict[Path, Any] = {}
        locations: list[_Location] = []
        for relative in info.split(split).files:
            file = info.folder / relative
            metadata = _read_footer(file)
            _check_columns(info, file, metadata.schema.to_arrow_schema())
            self._metadata[file] = metadata
            first_row = 0
            record = info.checksums.get(relative)
            if record is not None and record.rows != metadata.num_rows:
                raise DataError(
                    f"{file} holds {metadata.num_rows} rows, dataset.json says {record.rows}; copy "
                    f"it or prepare the dataset again"
                )
            for index in range(metadata.num_row_groups):
                rows = metadata.row_group(index).num_rows
                locations.append(_Location(file, index, first_row, 0, rows))
                first_row += rows
        found = sum(location.rows for location in locations)
        expected = info.split(split).rows
        if found != expected:
            raise DataError(
                f"split {split!r} of {info.folder} holds {found} rows, dataset.json says "
                f"{expected}; prepare the dataset again"
            )
        self._locations = list(_part_of(locations, round(part[0] * found), round(part[1] * found)))
        self.sizes = np.asarray([each.rows for each in self._locations], dtype=np.int64)

    @property
    def num_rows(self) -> int:
        """Rows of all groups together."""
        return int(self.sizes.sum())

    def read(self, number: int) -> Columns:
        """Decode row group `number` of the split."""
        location = self._locations[number]
        try:
            file = pq.ParquetFile(
                arrow_input(location.file),
                metadata=self._metadata[location.file],
                page_checksum_verification=True,
            )
            with file:
                table = file.read_row_group(location.index, columns=self._columns)
                if location.rows < table.num_rows:
                    table = table.slice(location.skipped, location.rows)
        except UNREADABLE as error:
            raise DataError(
                f"cannot read row group {location.index} of {location.file} ({one_line(error)}); the file is "
                f"damaged: copy it or prepare the dataset again"
            ) from None
        columns = {name: _one_chunk(table[name], location, name) for name in self._columns}
        result = Columns(
            labels=columns[self.info.label].to_numpy(),
            dense=[columns[name].to_numpy() for name in self.info.numeric_names],
            ids=[columns[feature.name].to_numpy() for feature in self.single],
            bags=[
                _to_bags(columns[feature.name], location, feature.name) for feature in self.multi
            ],
            weights=None if self.info.weight is None else columns[self.info.weight].to_numpy(),
        )
        self._check_values(result, location)
        return result

    def _check_values(self, columns: Columns, location: _Location) -> None:
        labels = columns.labels
        good = (labels == 0) | (labels == 1)
        if not good.all():
            row = int(np.argmin(good))
            raise DataError(
                f"{_where(location, row)}: label {self.info.label!r} is {labels[row]}; it must be 0 "
                f"or 1"
            )
        if columns.weights is not None:
            self._check_weights(columns.weights, location)
        for name, column in zip(self.info.numeric_names, columns.dense):
            # A sum is finite only if every value is, and costs a fraction of testing each.
            if not np.isfinite(column.sum(dtype=np.float64)):
                row = int(np.argmin(np.isfinite(column)))
                raise DataError(
                    f"{_where(location, row)}: numeric feature {name!r} is {column[row]}; it must "
                    f"be finite"
                )
        for feature, ids in zip(self.single, columns.ids):
            _check_ids(feature, ids, None, location)
        for feature, bags in zip(self.multi, columns.bags):
            _check_ids(feature, bags.values, bags.offsets, location)

    def _check_weights(self, weights: NDArray[np.float32], location: _Location) -> None:
        sound = are_weights(weights.astype(np.float64))
        if not sound.all():
            row = int(np.argmin(sound))
            raise DataError(
                f"{_where(location, row)}: weight {self.info.weight!r} is {weights[row]}; expected "
                f"{EXPECTED}"
            )


def _part_of(locations: list[_Location], first: int, last: int) -> Iterator[_Location]:
    """What of the row groups lies in rows [first, last) of the split."""
    start = 0
    for location in locations:
        skipped = max(0, first - start)
        rows = min(location.rows, last - start) - skipped
        if rows > 0:
            yield replace(location, skipped=skipped, rows=rows)
        start += location.rows


def _read_footer(file: Path) -> Any:
    try:
        return pq.read_metadata(arrow_input(file))
    except FileNotFoundError:
        raise DataError(f"{file} is missing; copy the whole folder or prepare it again") from None
    except UNREADABLE as error:
        raise DataError(
            f"{file} is not a complete Parquet file ({one_line(error)}); copy it or prepare the dataset again"
        ) from None


def _check_columns(info: DatasetInfo, file: Path, schema: Any) -> None:
    numbers = info.column_names[: len(info.column_names) - len(info.categorical)]
    expected = dict.fromkeys(numbers, "float")
    for feature in info.categorical:
        expected[feature.name] = "list of int32" if feature.multi_valued else "int32"
    for name, wanted in expected.items():
        if name not in schema.names:
            raise DataError(
                f"{file} has no column {name!r}, which dataset.json names; it has {schema.names}"
            )
        found = schema.field(name).type
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        said = f"list of {found.value_type}" if is_list else str(found)
        if said != wanted:
            raise DataError(f"{file}: column {name!r} is {said}, dataset.json says {wanted}")


def _one_chunk(column: Any, location: _Location, name: str) -> Any:
    if column.null_count:
        raise DataError(
            f"row group {location.index} of {location.file}: column {name!r} holds "
            f"{column.null_count} nulls; a prepared dataset has none"
        )
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _to_bags(column: Any, location: _Location, name: str) -> Bags:
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values[offsets[0] : offsets[-1]] if len(column) else column.values
    if values.null_count:
        raise DataError(
            f"row group {location.index} of {location.file}: lists of {name!r} hold "
            f"{values.null_count} nulls; a prepared dataset has none"
        )
    return Bags(offsets - offsets[0], values.to_numpy())


def _check_ids(
    feature: CategoricalFeature,
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64] | None,
    location: _Location,
) -> None:
    # As unsigned numbers negative ids are huge, so one maximum finds both kinds of bad id.
    unsigned = ids.view(np.uint32)
    if not len(ids) or unsigned.max() < feature.num_embeddings:
        return
    place = int(np.argmax(unsigned >= feature.num_embeddings))
    row = place if offsets is None else int(np.searchsorted(offsets, place, side="right")) - 1
    raise DataError(
        f"{_where(location, row)}: feature {feature.name!r} has id {ids[place]}, outside "
        f"[0, {feature.num_embeddings}), its num_embeddings in dataset.json; the two do not belong "
        f"together: prepare the dataset again"
    )


def _where(location: _Location, row: int) -> str:
    return f"{location.file}, row {location.first_row + location.skipped + row}"
