"""Forms of a collection's groups: their tensors under names that do not depend on the collection.

In a state dict, a group's tensors stand under the collection's own modules: `rows.embedding_bags`
for physical tables (padded), `route.routes.<method>` and `combine.combines.<method>` for the rest,
in parts for each table (`embcomp.layers.named_parts`). A form knows them as `rows.<table>`,
`route.<name>` and `combine.<name>`, each whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from embcomp.backends.base import MethodState
from embcomp.collection.groups import Group
from embcomp.layers.learned_buffers import fill_buffers
from embcomp.layers.named_parts import persistent_tensors, stored_tensors
from embcomp.layers.row_sources import RowSource
from embcomp.tables.specs import TableSpec


@dataclass(frozen=True, kw_only=True)
class GroupState:
    """A form and the logical tables that it holds."""

    tables: Sequence[TableSpec]
    form: MethodState


def read_states(groups: Sequence[Group], weights: Mapping[str, Tensor]) -> list[GroupState]:
    """The forms of built groups; their tensors are views, padding cut off.

    Args:
        groups: in the collection's order.
        weights: the physical tables' weights by name.
    """
    found = []
    for group in groups:
        tensors = {
            f"rows.{table.name}": weights[table.name].detach()[:, : table.embedding_dim]
            for table in group.backend.physical_tables
        }
        for part, module in group.modules():
            fill_buffers(module)
            state = persistent_tensors(module)
            tensors |= {f"{part}.{name}": tensor.detach() for name, tensor in state.items()}
        found.append(
            GroupState(tables=group.tables, form=MethodState(config=group.config, tensors=tensors))
        )
    return found


def state_tensors(group: Group, form: MethodState) -> dict[str, Tensor | RowSource]:
    """Those of a form's tensors that a built group has, as the collection's state dict has them."""
    came: dict[str, Tensor | RowSource] = {**form.tensors, **form.sources}
    found = {
        group.rows_name(table.name): came[f"rows.{table.name}"]
        for table in group.backend.physical_tables
        if f"rows.{table.name}" in came
    }
    for part, module in group.modules():
        own = {
            name: came[f"{part}.{name}"]
            for name in persistent_tensors(module)
            if f"{part}.{name}" in came
        }
        for name, tensor in stored_tensors(module, own).items():
            found[group.state_name(part, name)] = tensor
    return found


def pad_columns(tensor: Tensor, wanted: Tensor) -> Tensor:
    """A tensor with zero columns added up to the shape of `wanted`."""
    if tensor.shape == wanted.shape:
        return tensor
    padded = wanted.new_zeros(wanted.shape)
    padded[:, : tensor.shape[1]] = tensor
    return padded
