"""What methods share whose serving size is found by a search: full tables in training, then a budget."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from typing_extensions import Self, override

from embcomp.backends.base import BackendConfig, FollowedForm, FollowInputs, full_table
from embcomp.backends.widths.width_space import WidthSpace, width_choices
from embcomp.errors import ConfigError
from embcomp.io.constraints import Ge, Le, Positive
from embcomp.tables.footprint import Footprint, TensorFootprint, footprint_of
from embcomp.tables.specs import PhysicalTable, TableSpec

WidthGrid = Annotated[int | tuple[int, ...], Le(2**16)]
Rounds = Annotated[int, Ge(0), Le(10**6)]
"""Generations and epochs."""
Candidates = Annotated[int, Ge(0), Le(10**6)]
"""Of a generation of an evolution over sizes."""
FirstCandidates = Annotated[int, Ge(1), Le(10**6)]


@dataclass(frozen=True, kw_only=True)
class SearchedSize(BackendConfig):
    """Trains full tables and cuts them afterwards, into `target_bytes` where that is given.

    Args:
        target_bytes: serving bytes of the compressed tables together; what a budget comes to.
        width_grid: widths that a table may have: multiples of this, or a list. Its full width is
            always among them.
    """

    target_bytes: Annotated[int | None, Positive()] = None
    width_grid: WidthGrid = 1

    size_fields: ClassVar[tuple[str, ...]] = ("target_bytes",)
    learns_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        width_choices(self.width_grid, 1)

    def require_size(self) -> None:
        """Without a size, what is learnt decides."""

    def choices(self, table: TableSpec) -> tuple[int, ...]:
        """The widths that a table may have in the end."""
        return width_choices(self.width_grid, table.embedding_dim)

    def width_space(self, tables: Sequence[TableSpec]) -> WidthSpace:
        """The widths of tables that keep all their rows, and what each takes."""
        choices = tuple(self.choices(table) for table in tables)
        return WidthSpace(
            names=tuple(table.name for table in tables),
            choices=choices,
            sizes=tuple(
                tuple(table.num_embeddings * width * table.itemsize for width in widths)
                for table, widths in zip(tables, choices)
            ),
            rows=tuple(table.num_embeddings for table in tables),
            budget=self.target_bytes,
        )

    @abstractmethod
    def least_bytes(self, table: TableSpec) -> int:
        """What is left of a table when as much is cut off as may be."""

    @abstractmethod
    def train_only(self, tables: Sequence[TableSpec]) -> list[TensorFootprint]:
        """What training holds beside the full tables."""

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return self.least_bytes(table) >= table.full_bytes

    @override
    def holds_whole(self, table: TableSpec) -> bool:
        return True

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [full_table(table) for table in tables]

    @override
    def first_method(self) -> BackendConfig:
        return replace(self, target_bytes=None, budget=None)

    @override
    def footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        small = [table for table in tables if not self.keeps_full(table)]
        total = footprint_of(full_table(table) for table in tables if self.keeps_full(table))
        if not small:
            return total
        rows = footprint_of(self.physical_tables(small), served=False)
        return total + rows + self.dense_footprint(small)

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        bound = TensorFootprint(
            name=f"{self.name}.kept",
            role="weights",
            rows=1,
            columns=self._most_bytes(tables),
            itemsize=1,
            train_columns=0,
            trained=False,
        )
        return Footprint((bound, *self.train_only(tables)))

    def _most_bytes(self, tables: Sequence[TableSpec]) -> int:
        full = sum(table.full_bytes for table in tables)
        if self.target_bytes is None:
            return full
        least = sum(self.least_bytes(table) for table in tables)
        if self.target_bytes < least:
            raise ConfigError(
                f"{self.name}: target_bytes is {self.target_bytes:,}, but {len(tables)} table(s) take "
                f"{least:,} bytes when as much is pruned as may be"
            )
        return min(full, self.target_bytes)

    @override
    def follow_ids(self, past: FollowInputs) -> FollowedForm:
        return FollowedForm.with_row_of_each_id(self, past)

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        small = [table for table in tables if not self.keeps_full(table)]
        left = budget - sum(table.full_bytes for table in tables if self.keeps_full(table))
        if left < sum(self.least_bytes(table) for table in small):
            return None
        most = sum(table.full_bytes for table in small)
        return self.with_size(target_bytes=max(1, min(left, most)))

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        small = [table for table in tables if not self.keeps_full(table)]
        return self.with_size(target_bytes=max(1, sum(map(self.least_bytes, small))))
