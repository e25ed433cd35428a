"""Counts that someone else took: rows of (feature, value, count) in Parquet, as a GROUP BY of Spark writes them.

`prepare` ranks them itself, so that neither the order of rows and files nor whose sort it was matters. The
values are those of the train split, as the raw files write them; the counts replace those that
`prepare` would have taken, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from embcomp.data_pipelines.importers.base import RawFile, listed
from embcomp.data_pipelines.integrity import UNREADABLE
from embcomp.data_pipelines.preparing.counting import RunWriter
from embcomp.data_pipelines.preparing.engine import Advance, Engine, Part, map_parts
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.errors import DataError, one_line
from embcomp.io.parquet_batches import batches_of
from embcomp.io.remote_paths import arrow_input, as_path, version_of

COLUMNS = ("feature", "value", "count")
GIVEN = "given"
"""Where the scratch folder holds the run files."""
_AT_ONCE = 1 << 16
_ROW_BYTES = 150


@dataclass(frozen=True, kw_only=True)
class GivenCounts:
    """A folder of counts.

    Attributes:
        folder: as it was named.
        files: the Parquet files in it, also those of its partitions (`feature=user`).
    """

    folder: Path
    files: tuple[Path, ...]

    @classmethod
    def find(cls, folder: str | Path) -> GivenCounts:
        """List a folder that Spark wrote, or anyone else.

        Raises:
            DataError: it holds no Parquet file, or is still being written.
        """
        path = as_path(folder)
        if not path.is_dir():
            raise DataError(
                f"vocabulary {path} is no folder; expected Parquet files with the columns "
                f"{', '.join(COLUMNS)}, as a GROUP BY of Spark writes them"
            )
        if (path / "_temporary").exists():
            raise DataError(
                f"vocabulary {path} is still being written, or its job was killed: it holds "
                f"_temporary; wait for the job, or run it again"
            )
        files = tuple(_parquet_files(path))
        if not files:
            raise DataError(
                f"vocabulary {path} holds no .parquet file; expected the columns {', '.join(COLUMNS)}"
            )
        return cls(folder=path, files=files)

    @property
    def fingerprint(self) -> list[object]:
        """What a call must have in common with a killed one to go on from its pieces."""
        return [[str(file), *version_of(file)] for file in self.files]

    @property
    def counting_bytes(self) -> int:
        """What merging all counts at once may take."""
        metadata = [_open(file).metadata for file in self.files]
        groups = [each.row_group(at) for each in metadata for at in range(each.num_row_groups)]
        return sum(group.total_byte_size + _ROW_BYTES * group.num_rows for group in groups)


@dataclass(frozen=True, kw_only=True)
class GivenTask:
    """One file of counts to check and to cut.

    Attributes:
        file: the file.
        features: the names of all categorical features, in their order.
        wanted: those whose values are counted.
        partitions: into how many parts values are cut by their hash.
        folder: where run files go.
        prefix: what their names begin with.
        limit: bytes of counts that are held at once.
    """

    file: Path
    features: Sequence[str]
    wanted: frozenset[str]
    partitions: int
    folder: Path
    prefix: str
    limit: int


class GivenPart(BaseModel):
    """What files of counts hold: rows and the sum of counts by feature, and SHA-256 of run files."""

    rows: dict[str, int] = Field(default_factory=dict)
    total: dict[str, int] = Field(default_factory=dict)
    runs: dict[str, str] = Field(default_factory=dict)

    def merge(self, other: GivenPart) -> None:
        """Add what another file holds."""
        self.runs |= other.runs
        for mine, theirs in ((self.rows, other.rows), (self.total, other.total)):
            for name, number in theirs.items():
                mine[name] = mine.get(name, 0) + number


def cut_given(task: GivenTask, advance: Advance) -> GivenPart:
    """Check a file of counts; write its run files."""
    runs = RunWriter(len(task.features), task.partitions, task.folder, task.prefix, task.limit)
    part = GivenPart()
    places = {name: place for place, name in enumerate(task.features)}
    for frame in _frames(task.file):
        _check(task.file, frame)
        for (name,), rows in frame.partition_by("feature", as_dict=True).items():
            if name not in task.wanted:
                raise DataError(
                    f"{task.file}: {name!r} is none of the features that are counted; there are "
                    f"{', '.join(sorted(task.wanted))}"
                )
            # A group of missing values is no value.
            rows = rows.filter(pl.col("value").is_not_null() & (pl.col("value") != ""))
            part.rows[name] = part.rows.get(name, 0) + rows.height
            part.total[name] = part.total.get(name, 0) + int(rows["count"].sum())
            if rows.height:
                # Values that come twice are then fewer than rows, wherever they come.
                runs.add(places[name], rows.group_by("value").agg(pl.sum("count")))
    runs.flush()
    part.runs = runs.files
    return part


def take_given(
    given: GivenCounts,
    engine: Engine,
    work: Workspace,
    *,
    features: Sequence[str],
    wanted: Sequence[str],
    partitions: int,
    limit: int,
) -> GivenPart:
    """Cut all files of a folder.

    Raises:
        DataError: what they hold cannot be counts of these features.
    """
    folder = work.scratch / GIVEN
    folder.mkdir(exist_ok=True)
    parts = []
    for number, file in enumerate(given.files):
        name = f"given-{number:05d}-{partitions}"
        task = GivenTask(
            file=file,
            features=tuple(features),
            wanted=frozenset(wanted),
            partitions=partitions,
            folder=folder,
            prefix=name,
            limit=limit,
        )
        parts.append(Part(seal=f"{GIVEN}/{name}.json", task=task, size=1))
    found = GivenPart()
    for part in map_parts(
        engine,
        work,
        cut_given,
        parts,
        GivenPart,
        files=lambda task, part: {task.folder / run: sha for run, sha in part.runs.items()},
        advance=lambda step: None,
    ):
        found.merge(part)
    absent = [name for name in wanted if name not in found.rows]
    if absent:
        raise DataError(
            f"vocabulary {given.folder} has no row of the feature {absent[0]!r}; count its values too, "
            f"or encode it by a hash (--encode {absent[0]}=hash)"
        )
    return found


def check_unique(given: GivenCounts, name: str, rows: int, values: int) -> None:
    """Raise a DataError where a value has more rows than one."""
    if rows != values:
        raise DataError(
            f"vocabulary {given.folder} has {rows} rows of the feature {name!r} for {values} values: "
            f"some come more than once; group by feature and value over all rows at once, and write "
            f"with mode overwrite, not append"
        )


def check_known(
    given: GivenCounts, name: str, values: int, unseen: int, report: Callable[[str], None]
) -> None:
    """Raise a DataError where the counts know no value of the train split; report where they know few.

    Args:
        given: the counts.
        name: of a feature.
        values: of it in the train split, missing ones left out.
        unseen: how many of these got id 1.
        report: called with a line of news.
    """
    if values and unseen == values:
        raise DataError(
            f"none of the {values} values of {name!r} in the train split is kept in the vocabulary "
            f"{given.folder}: are they the same texts? Spark's inferSchema makes a number of 1234567d and "
            f"of 007; read text with a schema of strings, and group before any cast"
        )
    if unseen * 2 > values:
        report(
            f"{unseen / values:.1%} of the values of {name!r} in the train split are not kept in the "
            f"vocabulary {given.folder}; was it counted over these rows, and are texts written alike?"
        )


def _parquet_files(folder: Path) -> Iterator[Path]:
    """Files of a folder and of its partitions, without marks and checksums (`_SUCCESS`, `.crc`)."""
    for path in sorted(listed(folder)):
        if path.is_dir() and "=" in path.name:
            yield from _parquet_files(path)
        elif path.suffix == ".parquet":
            yield path


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(arrow_input(file))
    except UNREADABLE as error:
        raise DataError(f"{file} is no whole Parquet file: {one_line(error)}") from None


def _frames(file: Path) -> Iterator[pl.DataFrame]:
    """Yield feature, value and count as text, text and Int64."""
    source = _open(file)
    names = source.schema_arrow.names
    partitions = RawFile(path=file).partitions
    absent = [name for name in COLUMNS if name not in names and name not in partitions]
    if absent or "value" not in names or "count" not in names:
        raise DataError(
            f"{file} has the columns {', '.join(names)}; expected {', '.join(COLUMNS)}, one row for "
            f"each value"
        )
    for name in COLUMNS:
        if name in names:
            _check_type(file, name, source.schema_arrow.field(name).type)
    try:
        for batch in batches_of(source, _AT_ONCE, [name for name in COLUMNS if name in names]):
            batch.validate(full=True)
            frame = pl.DataFrame(pa.Table.from_batches([batch]).replace_schema_metadata(None))
            if "feature" not in names:
                frame = frame.with_columns(pl.lit(partitions["feature"]).alias("feature"))
            yield frame.select(
                pl.col("feature").cast(pl.String),
                pl.col("value").cast(pl.String),
                pl.col("count").cast(pl.Int64),
            )
    except UNREADABLE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read: {one_line(error)}") from None


def _check_type(file: Path, name: str, kind: pa.DataType) -> None:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if name == "count":
        if pa.types.is_integer(plain) and plain != pa.uint64():
            return
        raise DataError(f"{file}: the column 'count' holds {kind}; expected whole numbers (bigint)")
    if pa.types.is_string(plain) or pa.types.is_large_string(plain):
        return
    raise DataError(
        f"{file}: the column {name!r} holds {kind}; expected the text of the raw files: read them in "
        f"Spark with a schema of strings, as inferSchema makes a number of 1234567d and of 007"
    )


def _check(file: Path, frame: pl.DataFrame) -> None:
    wrong = (
        ("no feature", pl.col("feature").is_null()),
        ("no count", pl.col("count").is_null()),
        ("a count below 1", pl.col("count") < 1),
    )
    for what, expression in wrong:
        odd = frame.filter(expression.fill_null(False))
        if odd.height:
            raise DataError(f"{file}: a row has {what}: {odd.row(0, named=True)}")
