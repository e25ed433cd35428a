"""Vocabularies by their entries: what was added, renumbered, counted anew or dropped.

A file whose bytes our own writer does not give again (of another version of pyarrow, or of another
program) is not taken apart, and goes by its bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from embcomp.data_pipelines.preparing.row_writer import RowGroupWriter

COLUMNS = ("id", "value", "count")
KINDS = ("entries", "counts", "dropped")


@dataclass(frozen=True, kw_only=True)
class EntryDifference:
    """How a vocabulary differs from the one before.

    Attributes:
        entries: id, value and count of values that are new or have another id.
        counts: id and count of those that only occur more or less often.
        dropped: ids, in the old one, of values that are gone.
    """

    entries: pl.DataFrame
    counts: pl.DataFrame
    dropped: pl.DataFrame

    def parts(self) -> Mapping[str, pl.DataFrame]:
        """Its tables by kind."""
        return {kind: getattr(self, kind) for kind in KINDS}


def read_entries(file: Path) -> tuple[pl.DataFrame, pa.Schema] | None:
    """A vocabulary's entries and how they are stored; None for another kind of file."""
    try:
        schema = pq.read_schema(file)
        if tuple(schema.names) != COLUMNS:
            return None
        return pl.read_parquet(file, use_statistics=False), schema
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError):
        return None


def entry_difference(old: pl.DataFrame, new: pl.DataFrame) -> EntryDifference:
    """How one vocabulary differs from another."""
    known = old.rename({"count": "before"})
    at_home = new.join(known, on=["id", "value"], how="left", maintain_order="left")
    return EntryDifference(
        entries=at_home.filter(pl.col("before").is_null()).select(COLUMNS),
        counts=at_home.filter(pl.col("before") != pl.col("count")).select("id", "count"),
        dropped=old.join(new, on="value", how="anti", maintain_order="left").select("id"),
    )


def with_difference(old: pl.DataFrame, by: EntryDifference) -> pl.DataFrame:
    """The vocabulary of which that is the difference, by id."""
    kept = (
        old.join(by.dropped, on="id", how="anti")
        .join(by.entries, on="value", how="anti")
        .update(by.counts, on="id", how="left")
    )
    return pl.concat([kept.select(COLUMNS), by.entries.select(COLUMNS)]).sort("id")


def write_entries(entries: pl.DataFrame, schema: pa.Schema, path: Path) -> None:
    """Write a vocabulary as `prepare` does."""
    with RowGroupWriter(path, schema) as writer:
        writer.write(entries.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema))


def packed(table: pl.DataFrame) -> bytes:
    """A table's bytes."""
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd", compression_level=9)
    return buffer.getvalue()


def unpacked(read: Callable[[str], bytes]) -> EntryDifference:
    """The difference whose tables are read by kind.

    Raises:
        ValueError: they are not those of a vocabulary.
    """
    tables = {kind: pl.read_parquet(io.BytesIO(read(kind))) for kind in KINDS}
    wanted = {"entries": COLUMNS, "counts": ("id", "count"), "dropped": ("id",)}
    for kind, columns in wanted.items():
        if tuple(tables[kind].columns) != columns:
            raise ValueError(f"its {kind} have the columns {tables[kind].columns}")
    return EntryDifference(**tables)
