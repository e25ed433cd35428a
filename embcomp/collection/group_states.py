"""Forms of a collection's groups: their tensors under names that do not depend on the collection.

In a state dict, a group's tensors stand under the collection's own modules: ``rows.embedding_bags``
for physical tables (padded), ``route.routes.<n>`` and ``combine.combines.<n>`` for the rest. A form
knows them as ``rows.<table>``, ``route.<name>`` and ``combine.<name>``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from embcomp.backends.base import MethodState
from embcomp.collection.combine import Combine
from embcomp.collection.groups import Group
from embcomp.collection.route import CompositeRoute
from embcomp.tables.specs import TableSpec


@dataclass(frozen=True, kw_only=True)
class GroupState:
    """A form and the logical tables that it holds."""

    tables: Sequence[TableSpec]
    form: MethodState


def read_states(
    groups: Sequence[Group], weights: Mapping[str, Tensor], route: nn.Module, combine: nn.Module
) -> list[GroupState]:
    """The forms of built groups; their tensors are views, padding cut off.

    Args:
        groups: in the collection's order.
        weights: the physical tables' weights by name.
        route: the collection's route.
        combine: the collection's combine.
    """
    assert isinstance(route, CompositeRoute)
    assert isinstance(combine, Combine)
    found = []
    for index, group in enumerate(groups):
        tensors = {
            f"rows.{table.name}": weights[table.name].detach()[:, : table.embedding_dim]
            for table in group.backend.physical_tables
        }
        for part, modules in (("route", route.routes), ("combine", combine.combines)):
            state = modules[index].state_dict()
            tensors |= {f"{part}.{name}": tensor for name, tensor in state.items()}
        found.append(
            GroupState(tables=group.tables, form=MethodState(config=group.config, tensors=tensors))
        )
    return found


def group_names(group: Group, names: Iterable[str]) -> list[str]:
    """Those names of a form's tensors that a built group has."""
    own = {f"rows.{table.name}" for table in group.backend.physical_tables}
    own |= {f"route.{name}" for name in group.backend.route.state_dict()}
    own |= {f"combine.{name}" for name in group.backend.combine.state_dict()}
    return [name for name in names if name in own]


def state_name(name: str, index: int, inner: str) -> str:
    """A form's name as the collection's state dict has it.

    Args:
        name: as in ``MethodState.tensors``.
        index: the group's place in the collection.
        inner: the inner collection that holds the group's rows.
    """
    part, _, rest = name.partition(".")
    if part == "rows":
        return f"{inner}.embedding_bags.{rest}.weight"
    return f"route.routes.{index}.{rest}" if part == "route" else f"combine.combines.{index}.{rest}"


def pad_columns(tensor: Tensor, wanted: Tensor) -> Tensor:
    """A tensor with zero columns added up to the shape of ``wanted``."""
    if tensor.shape == wanted.shape:
        return tensor
    padded = wanted.new_zeros(wanted.shape)
    padded[:, : tensor.shape[1]] = tensor
    return padded
