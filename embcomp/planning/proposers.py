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


def proposers() -> list[Proposer]:
    """TorchRec's own, and this one."""
    return [
        GridSearchProposer(),
        GreedyProposer(),
        GreedyProposer(use_depth=False),
        UniformProposer(),
        RowsSplitWhereTheyCan(),
    ]


def _rank(option: ShardingOption) -> int:
    kind = option.sharding_type
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)
