"""Compressed tables as an artefact takes them: their forms, of which a block is read at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from embcomp.collection.assembled import build_groups
from embcomp.collection.group_states import GroupState
from embcomp.collection.groups import Group
from embcomp.collection.plan import ResolvedPlan
from embcomp.compressing.approximation import Approximated
from embcomp.tables.footprint import Footprint


@dataclass(frozen=True)
class StreamedForms:
    """Serving forms whose rows and codes stay where they are.

    Args:
        approximated: the tables.
    """

    approximated: Approximated

    @property
    def plan(self) -> ResolvedPlan:
        """The method of every table."""
        return self.approximated.plan

    @cached_property
    def groups(self) -> list[Group]:
        """The methods as built, without storage."""
        with torch.device("meta"):
            return build_groups(self.plan, unpooled=False)

    @property
    def footprint(self) -> Footprint:
        """Predicted bytes."""
        return self.plan.footprint

    def states(self) -> list[GroupState]:
        """Every method with its tables and tensors, in the order of the groups."""
        forms = {each.form.config: each.form for each in self.approximated.states}
        return [GroupState(tables=own.tables, form=forms[own.config]) for own in self.groups]
