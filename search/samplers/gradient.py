"""The columns that gradients choose: `dnis` at the budget, as the one candidate of a search.

What a search yields is then a training in stages, whose finals and recipes are ordinary ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from embcomp.collection.table_row_types import RowTypes
from embcomp.config.train_config import TrainConfig
from embcomp.errors import BudgetError
from embcomp.planning.config_plan import TableSize, table_specs
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.samplers.base import Asked, CandidateSampler, Proposal
from embcomp.search.space.repair import Repair
from embcomp.tables.budget import parse_budget


class Gradient(CandidateSampler):
    """The method itself.

    Args:
        repair: of a space that holds nothing else.
    """

    count = 1

    def __init__(self, repair: Repair) -> None:
        self._candidate = repair.smallest

    @override
    def propose(self, asked: Asked) -> Proposal:
        return Proposal(candidate=self._candidate, kind="gradient", fill=False)


def at_budget(config: SearchConfig, base: TrainConfig, sizes: Sequence[TableSize]) -> SearchConfig:
    """The search with its method sized to what fixed tables leave of the budget.

    Raises:
        BudgetError: when they leave nothing.
    """
    specs = {table.name: table for table in table_specs(base, sizes)}
    budget = parse_budget(config.budget, full_bytes=sum(t.full_bytes for t in specs.values()))
    left = budget
    for name, choice in config.fixed.items():
        if name in specs:
            ((method, row_type),) = choice.configs(base.tables.embedding_dim).values()
            types = RowTypes(default=row_type)
            left -= types.footprint(method, [specs[name]]).serve_bytes
    if left < 1:
        raise BudgetError(
            f"budget: fixed tables take {budget - left:,} of {budget:,} bytes and leave nothing"
        )
    (group,) = config.groups
    (choice,) = group.choices
    sized = choice.model_copy(update={"settings": {**choice.settings, "serve_bytes": (left,)}})
    group = group.model_copy(update={"choices": (sized,), "tied": True})
    return config.model_copy(update={"groups": (group,)})
