"""How often ids are looked up, from a Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from embcomp.errors import DataError
from embcomp.io.yaml_reading import listed
from embcomp.tables.specs import TableSpec

_EXPECTED = (
    "columns `id` and `count`, with `table` where there are several tables; or `count` alone, one row "
    "for each id in order"
)


def read_counts(path: Path, tables: Sequence[TableSpec]) -> dict[str, Tensor]:
    """Counts by table: (num_embeddings,) float64; ids that a file does not name have 0.

    Args:
        path: columns `id` and `count`, and `table` where there are several; or, for one table,
            `count` alone, a row for each id.
        tables: all tables.

    Raises:
        DataError: another layout, an id twice or outside its table, or another length.
    """
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: cannot be read as Parquet: {reason}") from None
    columns = set(frame.columns)
    if "count" not in columns or not frame["count"].dtype.is_numeric():
        raise DataError(f"{path}: expected {_EXPECTED}; got {listed(frame.columns)}")
    if "table" not in columns:
        if len(tables) > 1:
            names = listed(table.name for table in tables)
            raise DataError(
                f"{path}: there are {len(tables)} tables ({names}): expected {_EXPECTED}"
            )
        frame = frame.with_columns(pl.lit(tables[0].name).alias("table"))
    known = {table.name: table for table in tables}
    found: dict[str, Tensor] = {}
    for (name,), part in frame.group_by("table", maintain_order=True):
        if name not in known:
            raise DataError(f"{path}: no table is called {name!r}; the tables are {listed(known)}")
        found[str(name)] = _of_table(path, known[str(name)], part, has_ids="id" in columns)
    return found


def _of_table(path: Path, table: TableSpec, part: pl.DataFrame, *, has_ids: bool) -> Tensor:
    counts = torch.from_numpy(
        part["count"].cast(pl.Float64).fill_null(float("nan")).to_numpy(writable=True)
    )
    if not has_ids:
        return counts  # its length is compared with the table's
    if not part["id"].dtype.is_integer():
        raise DataError(f"{path}: expected integers as `id`, got {part['id'].dtype}")
    ids = torch.from_numpy(part["id"].cast(pl.Int64).fill_null(-1).to_numpy(writable=True))
    outside = (ids < 0) | (ids >= table.num_embeddings)
    if bool(outside.any()):
        raise DataError(
            f"{path}: table {table.name!r} has {table.num_embeddings:,} ids; the counts name id "
            f"{int(ids[outside][0])}"
        )
    if len(torch.unique(ids)) < len(ids):
        raise DataError(f"{path}: table {table.name!r}: an id stands twice in the counts")
    found = torch.zeros(table.num_embeddings, dtype=torch.float64)
    found[ids] = counts
    return found
