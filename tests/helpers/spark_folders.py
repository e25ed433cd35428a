"""Folders as Spark writes them: part files in no order, marks, hidden checksums."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq


def write_as_spark(
    folder: Path, frames: Sequence[pl.DataFrame | pa.Table], *, succeeded: bool = True
) -> Path:
    """Write one part file for each frame, with the names and the types that Spark gives them."""
    folder.mkdir(parents=True)
    run = uuid.uuid4()
    for number, frame in enumerate(frames):
        table = frame if isinstance(frame, pa.Table) else _plain(frame)
        path = folder / f"part-{number:05d}-{run}-c000.snappy.parquet"
        pq.write_table(table, path, compression="snappy", store_schema=False)
        (folder / f".{path.name}.crc").write_bytes(b"crc\0\0\0\2\0")
    if succeeded:
        (folder / "_SUCCESS").touch()
        (folder / "._SUCCESS.crc").write_bytes(b"crc\0\0\0\2\0")
    return folder


def _plain(frame: pl.DataFrame) -> pa.Table:
    """Plain strings: Spark knows no views and no large ones."""
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    fields = [
        pa.field(f.name, pa.string() if pa.types.is_large_string(f.type) else f.type)
        for f in table.schema
    ]
    return table.cast(pa.schema(fields))
