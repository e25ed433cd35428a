"""TorchRec's names for whole tables: states of its own collections taken over, and given back.

TorchRec stores a table as `embedding_bags.<table>.weight` or `embeddings.<table>.weight`, as wide as it
was declared. A method that holds a table whole (`BackendConfig.holds_whole`) stores the same rows
among its physical ones, padded to what fused kernels want.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.nn.functional import pad

from embcomp.backends.base import BackendConfig
from embcomp.collection.groups import Group
from embcomp.collection.sharded_columns import with_columns
from embcomp.collection.table_identity import mark_of, marks, shape_of, stored_shapes
from embcomp.io.yaml_reading import listed
from embcomp.layers.learned_buffers import fill_buffers
from embcomp.layers.named_parts import persistent_tensors, stored_tensors

KINDS = ("embedding_bags", "embeddings")
"""What TorchRec's two collections call the child that holds their tables."""


def torchrec_key(kind: str, table: str) -> str:
    """What one of TorchRec's collections calls a table's rows in its state dict."""
    return f"{kind}.{table}.weight"


def whole_tables(groups: Sequence[Group]) -> dict[str, str]:
    """For each table that is stored as TorchRec stores it, what its rows are called here."""
    return {
        table.name: group.rows_name(table.name)
        for group in groups
        for table in group.tables
        if group.config.holds_whole(table)
    }


def take_over(groups: Sequence[Group], state: MutableMapping[str, Any], prefix: str) -> None:
    """Give a collection's own names to tables that a state has under TorchRec's.

    What a method learns beside the rows stays as it is: the state is of a time before it learnt.

    Args:
        groups: the methods of the collection that is filled.
        state: what it is filled with, and perhaps more; changed in place.
        prefix: of the collection's entries there.
    """
    came = torchrec_tables(groups, state, prefix)
    if not came:
        return
    whole, shapes, beside = whole_tables(groups), stored_shapes(groups), _beside_rows(groups)
    for table, key in came.items():
        if table not in whole or prefix + whole[table] in state:
            continue  # torch says that the entry is one too many
        rows = prefix + whole[table]
        state[rows] = widened(state.pop(key), shapes[table][whole[table]][1])
        state.update({f"{prefix}route.{name}": mark for name, mark in marks([table]).items()})
        for name in shapes[table]:
            if name in beside:
                state.setdefault(prefix + name, beside[name])


def torchrec_tables(
    groups: Sequence[Group], state: Mapping[str, Any], prefix: str
) -> dict[str, str]:
    """The tables that a state has under TorchRec's names, and these."""
    return {
        table.name: prefix + torchrec_key(kind, table.name)
        for kind in KINDS
        for group in groups
        for table in group.tables
        if prefix + torchrec_key(kind, table.name) in state
    }


def _beside_rows(groups: Sequence[Group]) -> dict[str, Tensor]:
    """What methods have learnt beside their rows, by the names that a collection stores it under."""
    found: dict[str, Tensor] = {}
    for group in groups:
        for part, module in group.modules():
            fill_buffers(module)
            stored = stored_tensors(module, persistent_tensors(module))
            found |= {group.state_name(part, name): each.detach() for name, each in stored.items()}
    return found


def refusals(groups: Sequence[Group], tables: Iterable[str]) -> list[str]:
    """Why tables cannot be filled with whole rows: a line for each of these that cannot."""
    whole, wanted = whole_tables(groups), set(tables)
    return [
        f"{table.name}, which is held by {group.config.name}{_beginning(group.config)}"
        for group in groups
        for table in group.tables
        if table.name in wanted and table.name not in whole
    ]


def _beginning(method: BackendConfig) -> str:
    first = method.first_method()
    return "" if first == method else f" (which begins with {first.name})"


def widened(rows: Any, columns: int) -> Any:
    """Rows with columns of zeros added; as they are where they are no narrower, or no rows."""
    shape = shape_of(rows)
    if len(shape) != 2 or shape[1] >= columns:
        return rows
    if isinstance(rows, ShardedTensor):
        return with_columns(rows, columns)
    return pad(rows, (0, columns - shape[1]))


def narrowed(rows: Any, columns: int) -> Any:
    """The first columns of rows, a view unless they are sharded; as they are where they have no more."""
    shape = shape_of(rows)
    if len(shape) != 2 or shape[1] <= columns:
        return rows
    return with_columns(rows, columns) if isinstance(rows, ShardedTensor) else rows[:, :columns]


def give_back(
    groups: Sequence[Group], kind: str, state: MutableMapping[str, Any], prefix: str
) -> None:
    """Give TorchRec's names and widths to the tables of a collection that are held whole.

    Args:
        groups: the methods of the collection.
        kind: one of `KINDS`.
        state: a state dict of the collection, or of a model around it; changed in place. What methods
            have learnt beside rows that are held whole stays under the collection's names.
        prefix: of the collection's entries there.
    """
    widths = {table.name: table.embedding_dim for group in groups for table in group.tables}
    for table, name in whole_tables(groups).items():
        if prefix + name in state:
            rows = narrowed(state.pop(prefix + name), widths[table])
            state[prefix + torchrec_key(kind, table)] = rows
            state.pop(f"{prefix}route.{mark_of(table)}", None)


def warn_of_untouched(groups: Sequence[Group], state: Mapping[str, Any], prefix: str) -> None:
    """Warn of tables of which a state brings nothing, which nobody hears of unless loading is strict.

    Args:
        groups: the methods of the collection that is filled.
        state: what it is filled with, taken over.
        prefix: of the collection's entries there.
    """
    left = sorted(
        table.name
        for group in groups
        for table in group.tables
        if f"{prefix}route.{mark_of(table.name)}" not in state
    )
    if not left:
        return
    where = f" under {prefix!r}" if prefix else ""
    tables = "tables" if len(left) > 1 else "table"
    text = f"nothing is loaded of {tables} {listed(left)}: the state has no such rows{where}"
    refused = refusals(groups, torchrec_tables(groups, state, prefix))
    if refused:
        text += f"; whole rows cannot fill {listed(refused)}"
    warnings.warn(f"{text}; what is not loaded stays as it was", stacklevel=3)
