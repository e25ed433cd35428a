"""Raw rows in, a Parquet file of scores out: in row order and in bounded memory.

Every row of the input has a row in the output. A malformed one has no score; labels never decide
whether a row is scored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from embcomp.data_pipelines.importers.base import BadRow, Importer
from embcomp.data_pipelines.importers.sources import Paths, given_paths
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.preparing.row_encoder import RowStream
from embcomp.data_pipelines.preparing.row_writer import RowGroupWriter
from embcomp.errors import ArtefactError, DataError
from embcomp.io.unfinished import remove_unfinished, unfinished_folder
from embcomp.serving.artefact_config import ArtefactConfig
from embcomp.serving.artefact_loading import load
from embcomp.serving.modules import ServingModel
from embcomp.serving.raw_encoder import BATCH_SIZE, MAX_BAD_ROWS, RawBatch, RawEncoder, encoder

SUFFIXES = (".parquet", ".pq")
_MARK = b"embcomp.scores"


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The scored rows that have a label, in order: what metrics are computed of.

    Attributes:
        logits: (N,) float32.
        labels: (N,) float32, zeros and ones.
        groups: (N,) int64, if the dataset names a group.
        weights: (N,) float32, if the rows have weights; NaN for those without a sound one.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.float32]
    groups: NDArray[np.int64] | None
    weights: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """What `score` wrote.

    Attributes:
        path: the file.
        rows: its rows, those without a score among them.
        bad: how many rows were malformed, and have no score.
        first_bad: the first of them.
        unseen: for each feature, how many of its values had id 1, and how many there were.
        labelled: the rows with a label; None where they were not asked for.
    """

    path: Path
    rows: int
    bad: int
    first_bad: Sequence[BadRow]
    unseen: dict[str, tuple[int, int]]
    labelled: Labelled | None


def score(
    artefact: str | Path,
    source: Paths,
    out: str | Path,
    *,
    importer: str | Importer | None = None,
    schema: str | Path | None = None,
    form: str | None = None,
    batch_size: int = BATCH_SIZE,
    rows: int | None = None,
    threads: int | None = None,
    max_bad_rows: float = MAX_BAD_ROWS,
    keep_labelled: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> ScoredRows:
    """Score raw rows with an artefact, and write the scores as Parquet.

    Args:
        artefact: the folder of a whole model with its dataset's vocabularies.
        source: raw files or folders, in row order.
        out: the .parquet file to make, of columns row, probability, logit and, where there are
            labels or weights, label and weight.
        importer: how raw rows are written; by default as those that the dataset was prepared from.
        schema: the schema YAML that `table` needs; by default the dataset's own.
        form: for `libfm`, what its tokens are; by default what the dataset's were.
        batch_size: rows that are scored together.
        rows: how many rows to score; all by default.
        threads: how many threads score and look up; by default torch's own number.
        max_bad_rows: the share of malformed rows above which nothing is written.
        keep_labelled: whether to return logits, labels and weights, 16 bytes a row and 4 for a weight.
        overwrite: whether scores that are there already are replaced.
        progress: whether to show bars on stderr.

    Raises:
        ArtefactError: the artefact is damaged, holds tables alone, or has no vocabularies.
        DataError: the raw files, the format or the output are not what they have to be.
    """
    folder, out = Path(artefact), Path(out)
    config = ArtefactConfig.read(folder)
    if config.model is None:
        raise ArtefactError(
            f"{folder} holds tables alone, which score no rows: put `embcomp.load({str(folder)!r})` "
            "and `embcomp.encoder` into a model of your own, or export a run of `embcomp train`"
        )
    if threads is not None and threads < 1:
        raise DataError(f"threads is {threads}; expected 1 or more")
    target = _check_output(out, source, overwrite=overwrite)
    with _threads(threads):
        rows_of = encoder(folder, importer=importer, schema=schema, form=form, threads=threads)
        stream = rows_of.open(source, rows=rows, max_bad_rows=max_bad_rows, progress=progress)
        model = load(folder)
        assert isinstance(model, ServingModel)
        kept = _Kept() if keep_labelled else None
        batches = _scored(model, rows_of, stream, batch_size)
        with (
            _new_file(target, overwrite=overwrite) as path,
            phase("score", stream.total, show=progress) as advance,
        ):
            _write(path, batches, stream, config, kept, advance)
    return ScoredRows(
        path=out,
        rows=stream.total,
        bad=stream.bad,
        first_bad=stream.first_bad,
        unseen={name: (unseen, values) for name, (unseen, values) in stream.unseen.items()},
        labelled=None if kept is None else kept.labelled(),
    )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _scores(model: ServingModel, batch: RawBatch) -> tuple[NDArray, NDArray]:
    """(B,) float32 logits and probabilities."""
    logits = model(batch.dense, batch.sparse).float()
    return logits.cpu().numpy(), logits.sigmoid().cpu().numpy()


def _scored(
    model: ServingModel, rows_of: RawEncoder, stream: RowStream, batch_size: int
) -> Iterator[tuple[RawBatch, NDArray, NDArray]]:
    for batch in rows_of.cut(stream, batch_size):
        yield batch, *_scores(model, batch)


def _write(
    path: Path,
    batches: Iterator[tuple[RawBatch, NDArray, NDArray]],
    stream: RowStream,
    config: ArtefactConfig,
    kept: _Kept | None,
    advance: Callable[[int], None],
) -> None:
    """Write every row of the stream; those that no batch has are malformed, and have nulls."""
    has_weights = stream.table.has_weights
    schema = _schema(config, has_labels=stream.table.has_labels, has_weights=has_weights)
    done = 0
    with RowGroupWriter(path, schema) as writer:
        for batch, logits, probabilities in batches:
            numbers, labels = batch.rows.numpy(), batch.labels.numpy()
            weights = batch.weights.numpy() if has_weights and batch.weights is not None else None
            end = int(numbers[-1]) + 1
            columns = {"probability": probabilities, "logit": logits, "label": labels}
            if weights is not None:
                columns["weight"] = weights
            writer.write(_table(schema, done, end, numbers, columns))
            if kept is not None:
                groups = None if batch.groups is None else batch.groups.numpy()
                kept.add(logits, labels, groups, weights)
            advance(end - done)
            done = end
        if done < stream.total:
            none = dict.fromkeys(schema.names[1:], np.zeros(0, dtype=np.float32))
            numbers = np.zeros(0, dtype=np.int64)
            writer.write(_table(schema, done, stream.total, numbers, none))
            advance(stream.total - done)


def _schema(config: ArtefactConfig, *, has_labels: bool, has_weights: bool) -> pa.Schema:
    fields = [pa.field("row", pa.int64(), nullable=False)]
    names = ["probability", "logit", *["label"] * has_labels, *["weight"] * has_weights]
    fields += [pa.field(name, pa.float32()) for name in names]
    about = {
        "artefact": config.digest,
        "model": None if config.model is None else config.model.name,
        "dataset": None if config.dataset is None else config.dataset.name,
        "embcomp": config.embcomp_version,
    }
    return pa.schema(fields, metadata={_MARK: json.dumps(about).encode()})


def _table(
    schema: pa.Schema,
    start: int,
    end: int,
    numbers: NDArray[np.int64],
    values: Mapping[str, NDArray],
) -> pa.Table:
    """Rows `start` to `end` of the input, of which `numbers` have a score.

    Args:
        values: by column, those of the rows with a score; NaN is a label or weight that is not there.
    """
    places = numbers - start
    has_score = np.zeros(end - start, dtype=bool)
    has_score[places] = True
    columns = [pa.array(np.arange(start, end, dtype=np.int64))]
    for name in schema.names[1:]:
        whole = np.zeros(end - start, dtype=np.float32)
        whole[places] = values[name]
        absent = ~has_score
        if name in ("label", "weight"):
            absent = absent | np.isnan(whole)
        columns.append(pa.array(whole, pa.float32(), mask=absent))
    return pa.Table.from_arrays(columns, schema=schema)


class _Kept:
    """Logits and labels of the rows that have one, until all are known."""

    def __init__(self) -> None:
        self._logits: list[NDArray] = []
        self._labels: list[NDArray] = []
        self._groups: list[NDArray] = []
        self._weights: list[NDArray] = []

    def add(
        self, logits: NDArray, labels: NDArray, groups: NDArray | None, weights: NDArray | None
    ) -> None:
        has_label = ~np.isnan(labels)
        self._logits.append(logits[has_label])
        self._labels.append(labels[has_label])
        if groups is not None:
            self._groups.append(groups[has_label])
        if weights is not None:
            self._weights.append(weights[has_label])

    def labelled(self) -> Labelled:
        none = [np.zeros(0, dtype=np.float32)]
        return Labelled(
            logits=np.concatenate(self._logits or none),
            labels=np.concatenate(self._labels or none),
            groups=np.concatenate(self._groups) if self._groups else None,
            weights=np.concatenate(self._weights) if self._weights else None,
        )


def _check_output(out: Path, source: Paths, *, overwrite: bool) -> Path:
    """Refuse an output that would destroy something; returns where it really lies."""
    if out.suffix not in SUFFIXES:
        raise DataError(
            f"{out}: the last argument is the file of scores to make, which is called "
            f"{' or '.join('*' + each for each in SUFFIXES)}; raw files come before it"
        )
    target = out.resolve()
    for path in given_paths(source):
        if path.resolve() in (target, *target.parents):
            raise DataError(
                f"{out} is one of the raw files, or lies in their folder; name another file for the "
                f"scores"
            )
    if target.is_dir():
        raise DataError(f"{out} is a folder; name a file in it")
    if not target.exists():
        return target
    if not overwrite:
        raise DataError(f"{out} exists and is left as it is; --overwrite replaces scores")
    metadata = None
    with suppress(pa.ArrowException, OSError):
        metadata = pq.read_schema(target).metadata
    if _MARK not in (metadata or {}):
        raise DataError(
            f"{out} exists and is no file of scores, so that it is left as it is; remove it or "
            "name another one"
        )
    return target


@contextmanager
def _new_file(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A file in a hidden folder that becomes `target` when all went well; else nothing is left."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(target.parent)
        with unfinished_folder(target) as folder:
            path = folder / target.name
            yield path
            with path.open("rb") as file:
                os.fsync(file.fileno())
            if target.exists() and not overwrite:
                raise DataError(f"{target} was made meanwhile, and is left as it is")
            path.replace(target)
    except OSError as error:
        raise DataError(
            f"{target} could not be written: {error.strerror or error}; nothing is left of it"
        ) from error
