"""Rows of several tables in the order in which pruning keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from embcomp.backends.low_dim import pruned_bytes
from embcomp.layers.best_values import BestValues, Cut
from embcomp.layers.block_work import IN_MEMORY, Work
from embcomp.layers.row_sources import RowSource, as_rows
from embcomp.tables.specs import TableSpec, by_name


class RowRanking:
    """The best rows of all tables together.

    Args:
        tables: the group.
        importance: for each table, (N,) float64 what is lost with each row, not negative; rows of
            minus infinity are never kept. Equals are kept in the order of tables' names and ids.
        work: does a pass over them.
        name: unique in the stage.
    """

    def __init__(
        self,
        tables: Sequence[TableSpec],
        importance: Mapping[str, RowSource | Tensor],
        work: Work = IN_MEMORY,
        name: str = "rows",
    ) -> None:
        self._tables = list(tables)
        values = {table.name: as_rows(importance[table.name]) for table in by_name(tables)}
        self._best = BestValues(work, name, values)
        self._cuts: dict[int, Cut] = {}

    @property
    def most(self) -> int:
        """How many rows may be kept."""
        return self._best.most

    def masks(self, kept: int) -> dict[str, RowSource]:
        """For each table, (N,) bool which rows are among the best `kept` of all tables."""
        return self._best.kept(self._cut(kept))

    def counts(self, kept: int) -> dict[str, int]:
        """For each table, how many of its rows are among the best `kept`."""
        return self._cut(kept).counts

    def _cut(self, kept: int) -> Cut:
        if kept not in self._cuts:
            found = self._best.cut(lambda counts: sum(counts.values()) <= kept)
            assert found is not None
            self._cuts[kept] = found
        return self._cuts[kept]

    def within(self, budget: int, widths: Mapping[str, int]) -> int | None:
        """How many of the best rows fit into a budget; None where not even their absence does."""

        def fits(counts: Mapping[str, int]) -> bool:
            sizes = (pruned_bytes(t, counts[t.name], widths[t.name]) for t in self._tables)
            return sum(sizes) <= budget

        found = self._best.cut(fits)
        return None if found is None else sum(found.counts.values())
