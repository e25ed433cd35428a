"""Raw rows as an artefact's model takes them: read, encoded and cut into batches.

An artefact carries all that this needs: how raw rows are written, vocabularies, and the figures of
numeric transforms. What comes out of it is what `embcomp prepare` would have written, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.data_pipelines.importers.base import Importer
from embcomp.data_pipelines.importers.canonical import (
    canonical_lists,
    canonical_text,
    has_canonical_text,
)
from embcomp.data_pipelines.importers.registry import importer_of, make_importer
from embcomp.data_pipelines.importers.sources import Paths, raw_files
from embcomp.data_pipelines.importers.table_columns import as_number
from embcomp.data_pipelines.integrity import check_vocabularies
from embcomp.data_pipelines.loader.prefetch import ahead
from embcomp.data_pipelines.loader.row_groups import Columns
from embcomp.data_pipelines.loader.shuffle_buffer import BatchMaker, ShuffleBuffer
from embcomp.data_pipelines.preparing.row_encoder import (
    EncodedRows,
    RowEncoder,
    RowStream,
    index_rows,
)
from embcomp.data_pipelines.schema import FILE_NAME, CategoricalFeature, DatasetInfo
from embcomp.errors import ArtefactError, DataError, one_line
from embcomp.serving.artefact_config import ArtefactConfig
from embcomp.serving.artefact_integrity import check_file

BATCH_SIZE = 4096
MAX_BAD_ROWS = 1e-4
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class RawBatch:
    """Encoded rows: `model(batch.dense, batch.sparse)` scores them.

    Attributes:
        rows: (B,) int64, each row's number in the input, from 0.
        dense: (B, I) float32, transformed numbers in the dataset's order.
        sparse: ids of the categorical features, in the dataset's order.
        labels: (B,) float32, NaN for rows without a label.
        groups: (B,) int64 ids of the feature that grouped AUC groups by, if the dataset names one.
        weights: (B,) float32, NaN for rows without a sound weight; None where files have none.
    """

    rows: Tensor
    dense: Tensor
    sparse: KeyedJaggedTensor
    labels: Tensor
    groups: Tensor | None
    weights: Tensor | None = None


def encoder(
    path: str | Path,
    *,
    importer: str | Importer | None = None,
    schema: str | Path | None = None,
    form: str | None = None,
    threads: int | None = None,
    verify: bool = True,
) -> RawEncoder:
    """Read an artefact's description of its dataset as what encodes raw rows.

    Args:
        path: the artefact's folder.
        importer: how raw rows are written, by a name such as `criteo` or as an importer of your
            own; by default as those that the dataset was prepared from.
        schema: the schema YAML that `table` needs; by default the dataset's own.
        form: for `libfm`, what its tokens are; by default what the dataset's were.
        threads: how many features are looked up at a time.
        verify: whether to check that description and vocabularies are those that were written.

    Raises:
        ArtefactError: the artefact is damaged, or does not know its dataset.
        DataError: a feature has no vocabulary, or the format does not exist.
    """
    folder = Path(path)
    info = _dataset(folder, ArtefactConfig.read(folder, verify=verify), verify=verify)
    return RawEncoder(info, _importer(info, importer, schema, form), threads=threads)


def _dataset(folder: Path, config: ArtefactConfig, *, verify: bool) -> DatasetInfo:
    if config.dataset is None:
        raise ArtefactError(
            f"{folder} does not say which dataset its ids come from, so that raw rows have none; "
            "`embcomp export RUN` makes an artefact with its vocabularies"
        )
    info = DatasetInfo.load(folder)
    if verify:
        for name in (FILE_NAME, *info.files()):
            check_file(folder, config, name)
        check_vocabularies(info)
    return info


def _importer(
    info: DatasetInfo,
    importer: str | Importer | None,
    schema: str | Path | None,
    form: str | None,
) -> Importer | None:
    known = info.raw_format
    if isinstance(importer, Importer):
        return importer
    if importer is None and schema is None and form is None:
        return None if known is None else importer_of(known, str(info.folder / FILE_NAME))
    if importer is None:
        importer = "table" if schema is not None else "libfm"
    if known is not None and known.importer == importer and schema is None and form is None:
        return importer_of(known, str(info.folder / FILE_NAME))
    return make_importer(importer, schema, form)


class RawEncoder:
    """Encodes raw rows, of files or in memory, with an artefact's own vocabularies.

    Args:
        info: the dataset's description, with vocabularies.
        importer: reads the raw files; None where nobody knows how.
        threads: how many features are looked up at a time.
    """

    def __init__(
        self, info: DatasetInfo, importer: Importer | None, *, threads: int | None = None
    ) -> None:
        self.info = info
        self._importer = importer
        most = max(1, min(torch.get_num_threads(), _THREADS))
        self._rows = RowEncoder(info, most if threads is None else threads)
        self._maker = BatchMaker(info)

    def open(
        self,
        source: Paths,
        *,
        rows: int | None = None,
        max_bad_rows: float = MAX_BAD_ROWS,
        progress: bool = False,
    ) -> RowStream:
        """Open raw files whose rows may have labels or not.

        Args:
            source: a file, a folder, or several in row order.
            rows: how many rows to read; all by default.
            max_bad_rows: the share of malformed rows above which reading ends with an error.
            progress: whether to show a bar on stderr.

        Raises:
            DataError: a file is missing or of another format, or lacks a feature.
        """
        if not 0 <= max_bad_rows <= 1:
            raise DataError(f"max_bad_rows is {max_bad_rows}; expected a share from 0 to 1")
        if rows is not None and rows < 1:
            raise DataError(f"rows is {rows}; expected 1 or more, or none for all")
        if self._importer is None:
            raise DataError(
                f"{self.info.folder / FILE_NAME} does not say how raw rows are written: the dataset "
                f"{self.info.name!r} was prepared by an earlier version, or by an importer of "
                f"someone's own. Name the format (--format criteo; --format table --schema YAML), "
                f"or give `importer`"
            )
        files = raw_files(source, self._importer)
        table = self._importer.open_to_score(files)
        features = self._rows.features_of(table.layout, str(files[0].path))
        blocks, total = index_rows(table, rows, progress=progress)
        return RowStream(
            encoder=self._rows,
            table=table,
            features=features,
            blocks=blocks,
            total=total,
            max_bad_rows=max_bad_rows,
        )

    def batches(
        self,
        source: Paths,
        batch_size: int = BATCH_SIZE,
        *,
        rows: int | None = None,
        max_bad_rows: float = MAX_BAD_ROWS,
    ) -> Iterator[RawBatch]:
        """Read raw files as batches, in order and in bounded memory; malformed rows are left out.

        Args:
            source: a file, a folder, or several in row order.
            batch_size: rows of a batch; the last may have fewer.
            rows: how many rows to read; all by default.
            max_bad_rows: the share of malformed rows above which reading ends with an error.
        """
        stream = self.open(source, rows=rows, max_bad_rows=max_bad_rows)
        return self.cut(stream, batch_size)

    def cut(self, stream: RowStream, batch_size: int) -> Iterator[RawBatch]:
        """Cut the rows of opened files into batches.

        Args:
            stream: what `open` returned.
            batch_size: rows of a batch; the last may have fewer.
        """
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; expected 1 or more")
        pieces: list[tuple[NDArray[np.int64], Columns]] = []
        waiting = 0
        for block in ahead(iter(stream)):
            pieces.append(_numbered(block))
            waiting += len(block.offsets)
            if waiting < batch_size:
                continue
            yield from self._batches(pieces, waiting - waiting % batch_size, batch_size)
            waiting %= batch_size
            numbers, columns = pieces[-1]
            size = len(numbers)
            pieces = [(numbers[size - waiting :], columns.slice(size - waiting, size))]
        if waiting:
            yield from self._batches(pieces, waiting, batch_size)

    def _batches(
        self, pieces: Sequence[tuple[NDArray[np.int64], Columns]], stop: int, batch_size: int
    ) -> Iterator[RawBatch]:
        """The first `stop` rows of some pieces."""
        numbers = np.concatenate([each for each, _ in pieces])
        buffer = ShuffleBuffer([columns for _, columns in pieces], None)
        for start in range(0, stop, batch_size):
            end = min(start + batch_size, stop)
            batch = buffer.batch(self._maker, start, end, end - start)
            yield RawBatch(
                rows=torch.from_numpy(numbers[start:end]),
                dense=batch.dense,
                sparse=batch.sparse,
                labels=batch.labels,
                groups=batch.groups,
                weights=batch.weights,
            )

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> RawBatch:
        """Encode rows in memory.

        Args:
            columns: for each feature of the dataset its B raw values: numbers, values as the raw
                log writes them, or lists of such for a multi-valued feature; None is missing. Other
                columns are ignored.

        Raises:
            DataError: a feature is missing, or has values that it cannot have.
        """
        bucketed = () if self.info.raw_format is None else self.info.raw_format.bucketed
        series = [_numbers(name, columns) for name in (*self.info.numeric_names, *bucketed)]
        series += [
            _values(feature, columns)
            for feature in self.info.categorical
            if feature.name not in bucketed
        ]
        sizes = {each.name: len(each) for each in series}
        size = len(series[0])
        if len(set(sizes.values())) > 1 or not size:
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise DataError(f"expected the same number of rows, 1 or more, of each feature: {told}")
        labels = pl.Series("label", [None] * size, dtype=pl.Float32)
        frame = pl.DataFrame([labels, *series])
        encoded = self._rows.encode(frame, self._rows.features(bucketed))
        return next(self._batches([(np.arange(size), encoded)], size, size))


def _numbered(block: EncodedRows) -> tuple[NDArray[np.int64], Columns]:
    return block.start + block.offsets, block.columns


def _numbers(name: str, columns: Mapping[str, Sequence[Any]]) -> pl.Series:
    given = _series(name, columns)
    found = as_number(given)
    wrong = found.is_null() & ~_is_missing(given) | found.is_infinite().fill_null(False)
    if wrong.any():
        raise DataError(f"feature {name!r}: {given.filter(wrong)[0]!r} is no finite number")
    return found.alias(name)


def _values(feature: CategoricalFeature, columns: Mapping[str, Sequence[Any]]) -> pl.Series:
    given = _series(feature.name, columns)
    is_list = isinstance(given.dtype, pl.List | pl.Array)
    kind = given.dtype.inner if isinstance(given.dtype, pl.List | pl.Array) else given.dtype
    if kind is None or not has_canonical_text(kind):
        raise DataError(f"feature {feature.name!r}: {given.dtype} are no values of a category")
    if feature.multi_valued and (is_list or given.dtype.is_(pl.Null)):
        return canonical_lists(given if is_list else given.cast(pl.List(pl.String)))
    if feature.multi_valued or is_list:
        wanted = "a list of values" if feature.multi_valued else "one value"
        raise DataError(f"feature {feature.name!r}: expected {wanted} a row, got {given[0]!r}")
    return canonical_text(given)


def _series(name: str, columns: Mapping[str, Sequence[Any]]) -> pl.Series:
    if name not in columns:
        raise DataError(
            f"expected a column for feature {name!r}, which the batch lacks; it has "
            f"{', '.join(map(str, columns)) or 'none'}"
        )
    try:
        return pl.Series(name, columns[name])
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"feature {name!r}: its values are not of one type: {one_line(error)}"
        ) from None


def _is_missing(given: pl.Series) -> pl.Series:
    return canonical_text(given).is_null() if has_canonical_text(given.dtype) else given.is_null()
