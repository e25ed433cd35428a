"""Can TorchRec's planner place a candidate? Asked seldom, as one answer takes it a tenth of a second.

What the planner counts for a table split row-wise over all devices does not depend on the other
tables. So those bytes are taken from its own enumerator once for each physical table, and added up.
A table with too few rows to be split lies on one device, and is counted on each. When all of that
fits, a placement exists which the planner is made to try, so it cannot fail; when weights and state
alone exceed all devices together, it cannot succeed. Between the two it is asked, once for each set
of physical tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from embcomp.backends.base import BackendConfig, full_table
from embcomp.config.train_config import TrainConfig
from embcomp.planning.placement import (
    SHARDING,
    Device,
    Placement,
    PlacementError,
    PlacementRequest,
    TableShape,
    place,
    row_wise_bytes,
)
from embcomp.planning.planner import beside_rows_of
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.space.costs import Costs
from embcomp.search.space.space import Candidate, Space
from embcomp.tables.budget import parse_budget, reserved_bytes
from embcomp.tables.specs import PhysicalTable, TableSpec


@dataclass(frozen=True, kw_only=True)
class DeviceLimits:
    """What a device holds.

    Args:
        train: bytes of tables and optimizer state on one device; None when not limited.
        query: what the planner is asked; None when it is not.
        world_size: ranks over which tables are spread; 1 in dense mode, as each holds all.
    """

    train: int | None
    query: PlacementRequest | None
    world_size: int = 1


def limits_of(config: SearchConfig, base: TrainConfig, dense_rows: bool) -> DeviceLimits:
    """The limits that a search states.

    With ranks to spread tables over, bytes per device are the planner's to know.
    """
    topology = config.topology
    world = topology.world_size if topology else config.trials.world_size
    train = None if config.train_per_device is None else parse_budget(config.train_per_device)
    if dense_rows or (topology is None and (train is None or world == 1)):
        if dense_rows and topology:
            memory = parse_budget(topology.device_memory)
            free = memory - reserved_bytes(topology.reserve, memory)
            train = free if train is None else min(train, free)
        return DeviceLimits(train=train, query=None)
    device: Device = "cpu"
    memory, reserved = train or 0, 0
    if topology:
        device = topology.device
        memory = parse_budget(topology.device_memory)
        reserved = reserved_bytes(topology.reserve, memory)
        if train is not None:
            reserved = max(reserved, memory - train)
    chosen = base.train.sharding
    query = PlacementRequest(
        world_size=world,
        device_memory=memory,
        device=device,
        optimizer=base.train.row_optimizer.name,
        batch_size=-(-base.data.batch_size // world),
        reserved=reserved,
        sharding=SHARDING if chosen == "auto" else (chosen,),
        shard_codes_above=parse_budget(base.train.shard_codes_above),
    )
    return DeviceLimits(train=None, query=query, world_size=world)


@dataclass(frozen=True, kw_only=True)
class Held:
    """What the devices hold of some tables in one stage of training.

    Args:
        signatures: of the physical tables.
        single_values: whether some are looked up value by value; those cannot be split by rows.
        beside: bytes on every device that belong to no table.
    """

    signatures: Sequence[TableShape]
    single_values: bool = False
    beside: int = 0


def _together(parts: Sequence[Held]) -> Held:
    return Held(
        signatures=[one for part in parts for one in part.signatures],
        single_values=any(part.single_values for part in parts),
        beside=sum(part.beside for part in parts),
    )


class PlacementChecker:
    """Answers whether candidates can be placed, and where.

    Args:
        space: the space.
        costs: bytes of its candidates.
        limits: what a device holds.
    """

    def __init__(self, space: Space, costs: Costs, limits: DeviceLimits) -> None:
        self._space, self._costs = space, costs
        self.limits = limits
        self.asked = 0
        self._lengths = {size.name: size.mean_length for size in space.sizes}
        self._row_wise: dict[TableShape, tuple[int, ...]] = {}
        self._tables: dict[tuple[int, int], list[Held]] = {}
        self._known: dict[tuple[object, ...], bool] = {}
        plan = space.recipe_plan.first_order
        first = [] if plan is None else [self._held(c, group)[-1] for c, group in plan.groups]
        self._first_order = _together(first)

    @property
    def most_train(self) -> int | None:
        """Training bytes beyond which nothing fits, buffers left out; None if there is no limit."""
        query = self.limits.query
        if query is None:
            return self.limits.train
        return query.world_size * (query.device_memory - query.reserved)

    def fits(self, candidate: Candidate) -> bool:
        """Whether training the candidate fits the devices."""
        train, query = self.limits.train, self.limits.query
        cost = self._costs.of(candidate).train
        if train is not None and cost > train:
            return False
        if query is None:
            return True
        free = query.device_memory - query.reserved
        if cost > query.world_size * free:
            return False
        asked = [
            held for held in self._stages(candidate) if not self._fits_by_rows(held, query, free)
        ]
        if not asked:
            return True
        key = tuple((*sorted(held.signatures), held.beside, held.single_values) for held in asked)
        if key not in self._known:
            try:
                self.place(candidate)
                self._known[key] = True
            except PlacementError:
                self._known[key] = False
        return self._known[key]

    def _fits_by_rows(self, held: Held, query: PlacementRequest, free: int) -> bool:
        """Whether it is known without the planner that tables fit when they are split by rows."""
        if held.single_values or "row_wise" not in query.sharding:
            return False
        return max(self._add_row_wise(held.signatures, query)) + held.beside <= free

    def place(self, candidate: Candidate) -> Placement:
        """Ask the planner, whatever is known.

        Raises:
            PlacementError: when there is no placement; the text says why.
        """
        assert self.limits.query is not None
        self.asked += 1
        plan = self._space.config_plan(candidate)
        query = replace(self.limits.query, pooling_factors=plan.pooling_factors())
        return place(plan.on_meta(), query)

    def _add_row_wise(self, signatures: Sequence[TableShape], query: PlacementRequest) -> list[int]:
        missing = sorted({one for one in signatures if one not in self._row_wise})
        if missing:
            found = row_wise_bytes(missing, query)
            self._row_wise |= dict(zip(missing, found))
        totals = [0] * query.world_size
        for one in signatures:
            for rank, size in enumerate(self._row_wise[one]):
                totals[rank] += size
        return totals

    def _stages(self, candidate: Candidate) -> list[Held]:
        """All tables as they are held from stage to stage."""
        if self._costs.additive:
            parts = [self._of_option(u, o) for u, o in enumerate(candidate)]
        else:
            groups = self._space.plan(candidate).groups
            parts = [self._held(config, tables) for config, tables in groups]
        stages = max(len(part) for part in parts)
        return [
            _together([self._first_order, *(part[min(stage, len(part) - 1)] for part in parts)])
            for stage in range(stages)
        ]

    def _of_option(self, unit: int, place: int) -> list[Held]:
        if (unit, place) not in self._tables:
            config = self._space.units[unit].options[place].config
            self._tables[unit, place] = self._held(config, self._space.units[unit].tables)
        return self._tables[unit, place]

    def _held(self, config: BackendConfig, tables: Sequence[TableSpec]) -> list[Held]:
        """The physical tables of a method in each of its forms."""
        small = [table for table in tables if not config.keeps_full(table)]
        kept = [full_table(table) for table in tables if config.keeps_full(table)]
        if not small:
            return [Held(signatures=[self._signature(table) for table in kept])]
        found = []
        for form in config.training_forms(small):
            with torch.device("meta"):  # codes are as long as a vocabulary
                backend = form.build(small)
            beside = form.dense_footprint(small).train_weight_bytes
            if self.limits.query is not None:
                beside = beside_rows_of(form, small, backend.route, self.limits.query).on_each
            found.append(
                Held(
                    signatures=[
                        self._signature(table) for table in [*kept, *form.physical_tables(small)]
                    ],
                    single_values=backend.needs_unpooled_rows,
                    beside=beside,
                )
            )
        return found

    def _signature(self, table: PhysicalTable) -> TableShape:
        lengths = tuple(self._lengths.get(key.feature, 1.0) for key in table.lookups)
        config = table.config()
        return table.num_embeddings, config.embedding_dim, table.data_type_bytes, lengths
