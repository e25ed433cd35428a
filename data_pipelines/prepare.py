"""Turn raw logs into a dataset folder: index, count, rank, encode.

Polars' streaming engine has no memory limit, keeps no line numbers and gives up at the first bad
row, so the input is cut into blocks of whole lines here and polars works on a block at a time.
Memory is then a sum of known terms: one block, the counts or indices that `max_memory` leaves room
for, and a row group per split. Blocks do not depend on `max_memory`, and neither does any byte of
the result.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import psutil
import pyarrow as pa

from embcomp.data_pipelines.importers.base import Importer
from embcomp.data_pipelines.importers.registry import describe_format, make_importer
from embcomp.data_pipelines.importers.sources import Source, raw_files
from embcomp.data_pipelines.preparing.describing import versions
from embcomp.data_pipelines.preparing.engine import Engine, EngineError, LocalEngine
from embcomp.data_pipelines.preparing.feature_names import check_names
from embcomp.data_pipelines.preparing.features import choose_features
from embcomp.data_pipelines.preparing.given_counts import GivenCounts
from embcomp.data_pipelines.preparing.growth import check_same_features, parse_growth
from embcomp.data_pipelines.preparing.passes import PreparePasses
from embcomp.data_pipelines.preparing.prepare_settings import PrepareSettings
from embcomp.data_pipelines.preparing.row_writer import ROWS_PER_GROUP
from embcomp.data_pipelines.preparing.url_workspace import UrlWorkspace
from embcomp.data_pipelines.preparing.workspace import Report, Workspace, disk_errors, mib
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.splits import FileSplit, RandomSplit, SplitRule, TimeSplit, parse_split
from embcomp.errors import DataError
from embcomp.io.byte_sizes import parse_bytes
from embcomp.io.remote_paths import RemotePath, as_path, version_of

BLOCKS_PER_PART = 128
# What two blocks of 4 MiB on their way, the row groups in writing and the allocators were seen to
# take together; benchmarks/prepare.py measures it.
_BLOCK_MEMORY = 224 << 20
_LEAST_MEMORY = 32 << 20


def prepare(
    source: Source,
    output: str | Path,
    *,
    importer: str | Importer,
    schema: str | Path | None = None,
    name: str | None = None,
    split: SplitRule | Mapping[str, object] | str | None = None,
    min_count: int | Mapping[str, int] | None = None,
    numeric: str | Mapping[str, str] | None = None,
    group: str | None = None,
    weight: str | None = None,
    encode: str | Mapping[str, str] | None = None,
    vocabulary: str | Path | None = None,
    extend: str | Path | None = None,
    room: str | float | None = None,
    decay: float | None = None,
    retire_after: int | None = None,
    max_memory: int | str = "4GiB",
    max_bad_rows: float = 1e-4,
    overwrite: bool = False,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
    rows_per_group: int = ROWS_PER_GROUP,
    blocks_per_part: int = BLOCKS_PER_PART,
    engine: Engine | None = None,
) -> DatasetInfo:
    """Prepare a dataset; the same arguments and raw bytes give the same bytes.

    A call that was killed goes on where it was when it is made again; one that fails with a
    DataError leaves nothing behind. An existing dataset is replaced only with `overwrite`, and
    only once the new one is whole.

    Args:
        source: a raw file, a folder of them, several files in row order, or a mapping from
            "train", "valid" and "test" to any of these.
        output: the dataset folder to make.
        importer: a name of `IMPORTERS`, or an importer with options of its own.
        schema: the schema YAML that the importer `table` needs.
        name: the dataset's name; the output folder's name by default.
        split: a rule, its kind ("random", "chronological", "files") or a mapping with its fields.
            By default "files" when `source` is a mapping, else the importer's own (for Criteo and
            Avazu, whose rows are in time order, "chronological"), else random; 8:1:1.
        min_count: values that the train split holds less often get id 1; one number or one by
            feature. By default the importer's.
        numeric: a transform for all numeric columns, or one by column. By default the importer's.
        group: the categorical feature that GAUC groups by; by default the importer's.
        weight: the raw column of the rows' weights; by default the schema's.
        encode: "hash" makes ids hashes of values, without a vocabulary, "vocabulary" counts values,
            "ids" takes values for ids; one for all categorical features or one by name. By default the
            schema's.
        vocabulary: a folder of counts that someone else took, Parquet with the columns feature, value
            and count, in place of those of the train split.
        extend: an earlier dataset of the same features: its values keep their ids, new ones come
            after them, and numeric transforms keep its figures.
        room: ids to reserve for values to come, as "20%" or 0.2 of those in use, so that tables keep
            their size from day to day. None reserves none.
        decay: by what counts are multiplied from one dataset to the next, .9 by default.
        retire_after: values that are unseen in so many datasets in a row lose their ids, which new
            values take; None keeps them for good.
        max_memory: bytes that the process may take in all, as a number or such as "4GiB".
        max_bad_rows: the share of malformed rows above which the call fails.
        progress: show bars on stderr.
        report: called with lines of news: what is resumed, which rows are malformed.
        rows_per_group: rows of a row group.
        blocks_per_part: blocks of 4 MiB of a part, which is what a killed run loses at most and what
            an engine gives a task.
        engine: what counts, ranks and encodes parts: this process by default, or a `RayEngine`.

    Raises:
        DataError: anything that is wrong with the input, the choices or the disk.
    """
    reader = make_importer(importer, schema) if isinstance(importer, str) else importer
    if weight is not None:
        reader = reader.weighted_by(weight)
    files = raw_files(source, reader)
    if split is None:
        split = FileSplit() if files[0].split is not None else reader.default_split
    rule = parse_split(RandomSplit() if split is None else split)
    if isinstance(rule, FileSplit) != (files[0].split is not None):
        raise DataError(
            "give `source` as a mapping from train, valid and test to files together with split "
            "'files', and only then"
        )
    if not 0 <= max_bad_rows <= 1:
        raise DataError(f"max_bad_rows is {max_bad_rows}; expected a share from 0 to 1")
    table = reader.open(files)
    if isinstance(rule, TimeSplit) and table.layout.time != rule.column:
        raise DataError(
            f"rows are to be split by {rule.column!r}, which only the schema of a `table` can ask "
            f"for: split: {{kind: time, column: {rule.column}}}"
        )
    features = choose_features(
        table.layout,
        numeric=numeric,
        min_count=min_count,
        default_min_count=reader.default_min_count,
        encode=encode,
    )
    check_names(
        (feature.name for feature in features.categorical),
        (column.name for column in features.numeric),
        reader.rename,
    )
    given = None if vocabulary is None else GivenCounts.find(vocabulary)
    if given is not None:
        features = features.counted_elsewhere()
    group = group or table.layout.group
    names = [feature.name for feature in features.categorical]
    if group is not None and group not in names:
        raise DataError(f"group {group!r} is no categorical feature; there are {', '.join(names)}")
    output = as_path(output)
    growth = parse_growth(extend, room, decay, retire_after, output)
    bucketed = [each.name for each in features.categorical if each.bucketed]
    if growth is not None and growth.before is not None:
        check_same_features(growth.before, features, bucketed)
    settings = PrepareSettings(
        table=table,
        features=features,
        rule=rule,
        name=name or output.resolve().name,
        group=group,
        memory_budget=_memory_budget(max_memory),
        max_bad_rows=max_bad_rows,
        progress=progress,
        report=report or (lambda line: None),
        rows_per_group=rows_per_group,
        blocks_per_part=blocks_per_part,
        raw_format=describe_format(reader, table, bucketed),
        growth=growth,
        engine=engine or LocalEngine(),
        given=given,
    )
    work = _workspace(output, overwrite, settings.report)
    fingerprint = _fingerprint(reader, settings)
    work.check_output(fingerprint)
    with disk_errors(work.output), _frugal_arrow(), work.open(fingerprint):
        try:
            settings.engine.begin(_limit(max_memory), work.mark)
            return PreparePasses(settings=settings, work=work).run()
        except Exception as error:
            # Nothing half-made stays behind an error; after a kill the pieces do stay, and where
            # an engine or a store fails that is no fault of the input.
            if not (isinstance(error, EngineError) or work.keeps_after(error)):
                work.discard()
            raise
        finally:
            table.close()


def _workspace(output: Path, overwrite: bool, report: Report) -> Workspace:
    if isinstance(output, RemotePath):
        return UrlWorkspace(output, overwrite=overwrite, report=report)
    return Workspace(output, overwrite=overwrite, report=report)


def _fingerprint(reader: Importer, settings: PrepareSettings) -> dict[str, object]:
    """What a run must have in common with a killed one to go on from its pieces."""
    return {
        "importer": repr(reader),
        "features": repr(settings.features),
        "split": settings.rule.model_dump(),
        "sizes": [settings.rows_per_group, settings.blocks_per_part, settings.max_bad_rows],
        "name": [settings.name, settings.group],
        "given": settings.given.fingerprint if settings.given is not None else None,
        "growth": settings.growth.fingerprint if settings.growth is not None else None,
        "files": [[str(f.path), f.split, *version_of(f.path)] for f in settings.table.files],
        # Pieces of an interrupted run are in the libraries' own formats.
        "versions": {**versions(), "polars": pl.__version__, "python": platform.python_version()},
    }


@contextmanager
def _frugal_arrow() -> Iterator[None]:
    """Let Arrow take memory from the system: its own pool keeps some 90 MiB that it freed."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def _limit(max_memory: int | str) -> int:
    limit = parse_bytes(str(max_memory))
    if limit is None:
        raise DataError(
            f"max_memory: {max_memory!r} is not a size; write for example 4GiB or 512MiB"
        )
    return limit


def _memory_budget(max_memory: int | str) -> int:
    """Return what counts, vocabularies and indices may take beside the blocks."""
    limit = _limit(max_memory)
    held = psutil.Process().memory_info().rss
    memory_budget = limit - held - _BLOCK_MEMORY
    if memory_budget < _LEAST_MEMORY:
        raise DataError(
            f"max_memory is {mib(limit)}, but this process already holds {mib(held)} and a "
            f"block takes {mib(_BLOCK_MEMORY)}; give at least "
            f"{mib(held + _BLOCK_MEMORY + _LEAST_MEMORY)}"
        )
    return memory_budget
