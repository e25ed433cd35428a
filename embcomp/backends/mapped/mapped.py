"""Maps from a file: the rows that an id reads are what somebody else chose for it.

Many methods differ only in which rows an id reads: communities of a graph (GraphHash, Wu et al., WWW
2025, https://arxiv.org/abs/2412.17245; BACO, https://arxiv.org/abs/2604.18351), learned collisions
(https://arxiv.org/abs/2203.15837), prefixes of semantic ids (https://arxiv.org/abs/2504.02137), codes of
any quantiser. Here the map is data: a Parquet or `.npy` file of one line for each id and one column for each
row that it reads, which are summed or put side by side. Rows are trained as any table's.
`embcomp.tools.row_maps` makes such maps.

A map is packed to the bits that its longest column needs. It lies whole on every rank: unlike codes of large tables,
it is not dealt out over ranks. What it cannot say:
signs or offsets of single elements (ROBE), maps that change in training, decoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn
from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig, MethodState
from embcomp.backends.full import RangeCheck
from embcomp.backends.mapped.mapped_route import HashedLines, Lines, MappedRoute, MappedTable
from embcomp.backends.unified import FitWidths
from embcomp.errors import ConfigError, DataError
from embcomp.io.constraints import Count, Le
from embcomp.io.numeric_settings import shown
from embcomp.io.row_map_files import RowMapSummary, read_row_map, summarise_row_map
from embcomp.layers.hashing import table_salt
from embcomp.tables.footprint import Footprint, TensorFootprint
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit


@dataclass(frozen=True, kw_only=True)
class Mapped(BackendConfig):
    """Rows by a map that is given. Ids must lie in `[0, num_embeddings)`.

    Args:
        maps: by table, a Parquet or `.npy` file of the rows that each id reads. Tables that neither it
            nor `rows` names stay full.
        rows: by table, how many rows each column of its map names; found out of the file by default.
            Without a file the map is one of hashes, until a state brings another.
        skips: by table, whether an id may have no row under a column; found out of the file.
        combine: whether an id's rows are summed, or stand side by side, each a part of the width.
        shared: whether all columns of a map name the rows of one table; else each has rows of its own.
        digests: by table, the SHA-256 that its file must have.
        seed: salts the hashes of maps that nobody gave.
    """

    maps: Mapping[str, str] = field(default_factory=dict)
    rows: Annotated[Mapping[str, tuple[int, ...]], Count(1, of="table"), Le(2**31 - 1)] = field(
        default_factory=dict
    )
    skips: Mapping[str, bool] = field(default_factory=dict)
    combine: Literal["sum", "concat"] = "sum"
    shared: bool = False
    digests: Mapping[str, str] = field(default_factory=dict)
    seed: int = 2021

    name: ClassVar[str] = "mapped"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_kinds()
        for table, rows in self.rows.items():
            if not rows:
                raise ConfigError(f"mapped: rows of {table!r} names no column")
        for key in ("skips", "digests"):
            extra = sorted(set(getattr(self, key)) - set(self.named_tables()))
            if extra:
                raise ConfigError(f"mapped: {key} names {', '.join(extra)}, which has no map")

    def _check_kinds(self) -> None:
        """Raise a ConfigError for values of other types, which no rule of a number's looks at."""
        kinds = (
            ("maps", str, "the path of a file"),
            ("digests", str, "a SHA-256 in hexadecimal"),
            ("skips", bool, "true or false"),
            ("rows", tuple, "a list of how many rows each column names"),
        )
        for key, kind, words in kinds:
            given = getattr(self, key)
            if not isinstance(given, Mapping):
                raise ConfigError(f"mapped: expected {key} by table, got {shown(given)}")
            for table, value in given.items():
                if not isinstance(value, kind):
                    raise ConfigError(
                        f"mapped: {key} of {table!r} must be {words}, got {shown(value)}"
                    )

    @override
    def named_tables(self) -> Sequence[str]:
        return sorted({*self.maps, *self.rows})

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return table.name not in self.maps and table.name not in self.rows

    @property
    @override
    def is_serving_form(self) -> bool:
        return not self.maps

    def column_rows(self, table: TableSpec) -> tuple[int, ...]:
        """How many rows each column of a table's map names, of the columns that its width has room for.

        Raises:
            ConfigError: for a file that is not a map of this table's ids.
        """
        if table.name in self.rows:
            if table.name in self.maps:
                self._summary(table)
            rows = self.rows[table.name]
        else:
            rows = self._summary(table).rows
        if self.combine == "concat":
            rows = rows[: -(-table.embedding_dim // -(-table.embedding_dim // len(rows)))]
        return (max(rows),) * len(rows) if self.shared else rows

    def _skips(self, table: TableSpec) -> bool:
        if table.name in self.skips or table.name not in self.maps:
            return self.skips.get(table.name, False)
        return self._summary(table).skips

    def _summary(self, table: TableSpec) -> RowMapSummary:
        """What a table's file says, checked against the table and the settings."""
        path = self.maps[table.name]
        try:
            found = summarise_row_map(path)
        except DataError as error:
            raise ConfigError(f"mapped: table {table.name!r}: {error}") from None
        if found.num_ids != table.num_embeddings:
            raise ConfigError(
                f"mapped: table {table.name!r} has {table.num_embeddings:,} ids, and its map {path} has "
                f"{found.num_ids:,}; make a map of this table's ids"
            )
        wanted = self.digests.get(table.name)
        if wanted is not None and wanted != found.sha256:
            raise ConfigError(
                f"mapped: table {table.name!r}: expected a map of the SHA-256 {wanted}, and {path} has "
                f"{found.sha256}; it is another file"
            )
        self._refuse_more_rows(table, found)
        return found

    def _refuse_more_rows(self, table: TableSpec, found: RowMapSummary) -> None:
        rows, path = self.rows.get(table.name), self.maps[table.name]
        if rows is not None and len(rows) != len(found.rows):
            raise ConfigError(
                f"mapped: table {table.name!r}: rows has {len(rows)} columns, its map {path} "
                f"{len(found.rows)}"
            )
        for n, (most, named) in enumerate(zip(rows or (), found.rows)):
            if named > most:
                raise ConfigError(
                    f"mapped: table {table.name!r}: column {n} of its map {path} names row {named - 1}, "
                    f"and rows has {most} of them"
                )
        if found.skips and self.skips.get(table.name) is False:
            raise ConfigError(
                f"mapped: table {table.name!r}: its map {path} has ids without a row (-1), which skips "
                "says it has not; leave skips out"
            )

    @override
    def check_vocabularies(self, tables: Sequence[TableSpec], digests: Mapping[str, str]) -> None:
        for table in tables:
            if table.name not in self.maps or table.name not in digests:
                continue
            made_for = self._summary(table).vocabulary
            if made_for and made_for != digests[table.name]:
                raise ConfigError(
                    f"mapped: table {table.name!r}: its map {self.maps[table.name]} was made for another "
                    f"vocabulary ({made_for[:12]}..., the dataset's is {digests[table.name][:12]}...), so "
                    "that its ids mean other values; make it again for this dataset"
                )

    def _width(self, table: TableSpec) -> int:
        if self.combine == "sum":
            return table.embedding_dim
        return -(-table.embedding_dim // len(self.column_rows(table)))

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [self._physical(table, self.column_rows(table)) for table in tables]

    def _physical(self, table: TableSpec, rows: tuple[int, ...]) -> PhysicalTable:
        parts = 1 if self.combine == "sum" else len(rows)
        summed = len(rows) // parts
        return PhysicalTable(
            name=table.name,
            num_embeddings=max(rows) if self.shared else sum(rows),
            embedding_dim=self._width(table),
            lookups=tuple(
                LookupKey(table.name, feature, part)
                for feature in table.feature_names
                for part in range(parts)
            ),
            init_fn=UniformInit.with_std(table.init_std / summed**0.5),
            data_type=table.data_type,
        )

    def _mapped(self, table: TableSpec) -> MappedTable:
        rows = self.column_rows(table)
        firsts = [0] * len(rows) if self.shared else [*accumulate(rows, initial=0)][:-1]
        path = self.maps.get(table.name)
        return MappedTable(
            name=table.name,
            num_ids=table.num_embeddings,
            rows=rows,
            firsts=tuple(firsts),
            skips=self._skips(table),
            num_features=len(table.feature_names),
            lines=_hashed(table, rows, self.seed) if path is None else FileLines(path),
        )

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        mapped = [self._mapped(table) for table in tables]
        summed = self.combine == "sum"
        route = MappedRoute(keys, mapped, RangeCheck(tables), side_by_side=not summed)
        ids_per_value = max(len(table.rows) for table in mapped) if summed else 1
        uneven = summed and len({len(table.rows) for table in mapped}) > 1
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=route,
            combine=self._combine(tables),
            ids_per_value=ids_per_value,
            skips_negative_ids=uneven or any(table.skips for table in mapped),
        )

    def _combine(self, tables: Sequence[TableSpec]) -> nn.Module:
        if self.combine == "sum":
            return nn.Identity()
        came = {t.name: self._width(t) * len(self.column_rows(t)) for t in tables}
        if all(came[table.name] == table.embedding_dim for table in tables):
            return nn.Identity()
        widths = [
            (table.name, came[table.name], table.embedding_dim)
            for table in tables
            for _ in table.feature_names
        ]
        return FitWidths(widths, projected=set())

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        return Footprint(
            tuple(
                TensorFootprint(
                    name=f"{table.name}.codes",
                    role="codes",
                    rows=self._mapped(table).stored_bytes,
                    columns=1,
                    itemsize=1,
                    train_columns=1,
                    lookup=False,
                )
                for table in tables
            )
        )

    @override
    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """The same without the files: the map is in the state."""
        if not self.maps:
            return form
        held = replace(
            self,
            maps={},
            digests={},
            rows={table.name: self.column_rows(table) for table in tables},
            skips={table.name: self._skips(table) for table in tables},
        )
        return replace(form, config=held)

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        return self if self.footprint(tables).serve_bytes <= budget else None

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self


def _hashed(table: TableSpec, rows: Sequence[int], seed: int) -> Lines:
    """Rows that are hashes of (seed, table, column, id)."""
    salts = [table_salt(seed, table.name, column) for column in range(len(rows))]
    return HashedLines(salts, rows)


class FileLines:
    """Rows of a file, which is read when they are first asked for: `Lines`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._held: NDArray[np.integer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_held": None}

    def __call__(self, start: int, stop: int) -> NDArray[np.integer]:
        """The rows of a range of ids; those behind the last id are let go of."""
        held = read_row_map(self._path) if self._held is None else self._held
        self._held = None if stop == len(held) else held
        return held[start:stop]
