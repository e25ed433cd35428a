"""What TorchRec's planner is to try besides its own proposals."""

from __future__ import annotations

from torchrec.distributed.planner.proposers import (
    GreedyProposer,
    GridSearchProposer,
    UniformProposer,
)
from torchrec.distributed.planner.types import Enumerator, Proposer, ShardingOption, Topology
from torchrec.distributed.types import ShardingType
from typing_extensions import override

_LEAST_PROPOSALS = 16
_OPTIONS_TRIED = 12_000  # all of a greedy proposer's proposals up to about 55 tables of two options

_ORDER = (ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value)


class RowsSplitWhereTheyCan(Proposer):
    """All tables split by rows, but for those that must stay whole.

    The planner's own uniform proposal does not exist where some table cannot be split.
    """

    def __init__(self) -> None:
        self._proposal: list[ShardingOption] | None = None

    @override
    def load(
        self, search_space: list[ShardingOption], enumerator: Enumerator | None = None
    ) -> None:
        chosen: dict[str, ShardingOption] = {}
        for option in search_space:
            known = chosen.get(option.fqn)
            if known is None or _rank(option) < _rank(known):
                chosen[option.fqn] = option
        self._proposal = list(chosen.values()) or None

    @override
    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        self._proposal = None

    @override
    def propose(self) -> list[ShardingOption] | None:
        return self._proposal


class Bounded(Proposer):
    """Another proposer, cut short where tables are many.

    A greedy proposer makes as many proposals as there are options, and each takes time in
    proportion to them: a minute for a few hundred tables, to no better plan.

    Args:
        inner: the proposer.
    """

    def __init__(self, inner: Proposer) -> None:
        self._inner = inner
        self._left = 0

    @override
    def load(
        self, search_space: list[ShardingOption], enumerator: Enumerator | None = None
    ) -> None:
        self._left = max(_LEAST_PROPOSALS, _OPTIONS_TRIED // max(1, len(search_space)))
        self._inner.load(search_space, enumerator)

    @override
    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        self._left -= 1
        self._inner.feedback(partitionable, plan, perf_rating, storage_constraint)

    @override
    def propose(self) -> list[ShardingOption] | None:
        return self._inner.propose() if self._left > 0 else None


def proposers() -> list[Proposer]:
    """TorchRec's own, and this one."""
    return [
        GridSearchProposer(),
        Bounded(GreedyProposer()),
        Bounded(GreedyProposer(use_depth=False)),
        UniformProposer(),
        RowsSplitWhereTheyCan(),
    ]


def _rank(option: ShardingOption) -> int:
    kind = option.sharding_type
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)
