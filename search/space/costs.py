"""Exact bytes of a candidate, from numbers that are counted once.

Most methods store each table by itself, and bytes add up. Tables of one method that share storage
(one hashed table for all features) are counted together, once for each set of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embcomp.backends.base import BackendConfig
from embcomp.collection.table_row_types import RowTypes
from embcomp.planning.config_plan import most_train_bytes
from embcomp.search.space.space import Candidate, Space
from embcomp.tables.footprint import RowOptimizer
from embcomp.tables.row_types import RowType
from embcomp.tables.specs import TableSpec

Stored = tuple[BackendConfig, RowType]


@dataclass(frozen=True)
class CandidateBytes:
    """Bytes of a candidate.

    Args:
        serve: of the embedding tables when served.
        train: of rows, padding and optimizer state over all ranks, first-order weights included;
            in dense mode on each rank, the gradient included.
    """

    serve: int
    train: int


class Costs:
    """Counts the bytes of a space's candidates.

    Args:
        space: the space.
    """

    def __init__(self, space: Space) -> None:
        plan = space.recipe_plan
        self._space = space
        self._optimizer: RowOptimizer = plan.optimizer
        self._dense = plan.dense_rows
        first_order = plan.first_order
        groups = [] if first_order is None else first_order.groups
        self._first_order = sum(
            most_train_bytes(config, tables, self._optimizer, dense_rows=self._dense)
            for config, tables in groups
        )
        self._alone: list[list[CandidateBytes]] = [[] for _ in space.units]
        self._pool: list[list[int]] = [[] for _ in space.units]
        self._pools: list[Stored] = []
        self._pooled: dict[tuple[int, tuple[int, ...]], CandidateBytes] = {}
        self._count()

    @property
    def additive(self) -> bool:
        """Whether bytes of a candidate are the sum of its options' bytes."""
        return not self._pools

    def of_option(self, unit: int, place: int) -> CandidateBytes:
        """Bytes of one unit's option, stored by itself."""
        return self._alone[unit][place]

    def of(self, candidate: Candidate) -> CandidateBytes:
        """Bytes of a candidate."""
        serve, train = 0, self._first_order
        pools: dict[int, list[int]] = {}
        for unit, place in enumerate(candidate):
            pool = self._pool[unit][place]
            if pool >= 0:
                pools.setdefault(pool, []).append(unit)
            else:
                cost = self._alone[unit][place]
                serve, train = serve + cost.serve, train + cost.train
        for pool, units in pools.items():
            cost = self._of_pool(pool, tuple(units))
            serve, train = serve + cost.serve, train + cost.train
        return CandidateBytes(serve, train)

    def _of_pool(self, pool: int, units: tuple[int, ...]) -> CandidateBytes:
        key = (pool, units)
        if key not in self._pooled:
            tables = [table for unit in units for table in self._space.units[unit].tables]
            tables.sort(key=lambda table: table.index)
            self._pooled[key] = self._cost(*self._pools[pool], tables)
        return self._pooled[key]

    def _count(self) -> None:
        users: list[tuple[Stored, list[int]]] = []
        number: dict[tuple[int, int], int] = {}
        for u, unit in enumerate(self._space.units):
            for o, option in enumerate(unit.options):
                own = (option.config, option.row_type)
                place = next((i for i, (stored, _) in enumerate(users) if stored == own), -1)
                if place < 0:
                    place = len(users)
                    users.append((own, []))
                if u not in users[place][1]:
                    users[place][1].append(u)
                number[u, o] = place
        together = []
        for stored, units in users:
            tables = [table for u in units for table in self._space.units[u].tables]
            # Sharing between the tables of one unit is in the unit's own bytes.
            shared = len(units) > 1 and stored[0].stores_together(tables)
            together.append(len(self._pools) if shared else -1)
            if shared:
                self._pools.append(stored)
        for u, unit in enumerate(self._space.units):
            for o, option in enumerate(unit.options):
                cost = self._cost(option.config, option.row_type, unit.tables)
                self._alone[u].append(cost)
                self._pool[u].append(together[number[u, o]])

    def _cost(
        self, config: BackendConfig, row_type: RowType, tables: Sequence[TableSpec]
    ) -> CandidateBytes:
        footprint = RowTypes(default=row_type).footprint(config, tables)
        return CandidateBytes(
            footprint.serve_bytes,
            most_train_bytes(config, tables, self._optimizer, dense_rows=self._dense),
        )
