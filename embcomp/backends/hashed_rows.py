"""What methods have in common whose rows are fewer than ids, or follow from hashes of ids alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from typing_extensions import Self, override

from embcomp.backends.base import BackendConfig, FollowedForm, FollowInputs
from embcomp.io.constraints import Between, Ge
from embcomp.tables.budget import largest_int
from embcomp.tables.specs import TableSpec

_RATIO_STEPS = 1 << 40  # a ratio is a multiple of this one's inverse, so it is an exact float


@dataclass(frozen=True, kw_only=True)
class SizedByRows(BackendConfig):
    """A method of which each table has a number of rows, or a share of its ids' number.

    Args:
        num_buckets: rows of every compressed table.
        ratio: rows as a share of `num_embeddings`, rounded down, at least 1.
        collisionless: tables of at most this many rows stay full.
    """

    num_buckets: Annotated[int | None, Ge(1)] = None
    ratio: Annotated[float | None, Between(0, 1, "(]")] = None
    collisionless: Annotated[int, Ge(0)] = 100

    hashes_small: ClassVar[bool] = True
    size_fields: ClassVar[tuple[str, ...]] = ("num_buckets", "ratio")

    def rows(self, table: TableSpec) -> int:
        """Rows that stand for those of `table`."""
        if self.ratio is not None:
            return max(1, int(table.num_embeddings * self.ratio))
        return self.num_buckets or 1

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return (
            table.num_embeddings <= self.collisionless or self.rows(table) >= table.num_embeddings
        )

    def _at(self, step: int) -> Self:
        return self.with_size(ratio=step / _RATIO_STEPS)

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        def fits(step: int) -> bool:
            return self._at(step).footprint(tables).serve_bytes <= budget

        step = largest_int(fits, 1, _RATIO_STEPS)
        return None if step is None else self._at(step)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self._at(1)


@dataclass(frozen=True, kw_only=True)
class HashedRows(BackendConfig):
    """A method whose rows follow from the numbers of ids alone, whatever these are."""

    hashes_ids: ClassVar[bool] = True
    hashes_small: ClassVar[bool] = True

    @property
    @override
    def needs_same_numbers(self) -> bool:
        return True

    @override
    def follow_ids(self, past: FollowInputs) -> FollowedForm:
        return FollowedForm(config=self)
