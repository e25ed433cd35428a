"""Which tables a state dict holds, and whether a collection may take them over.

Tables are known by their names. A state dict says which it has by an empty entry for each,
`route.table@<name>`, first among the collection's, so that a loader that knows nothing of tables
stumbles over the name of the one that is missing. A table is loaded whole or not at all: one whose rows
came without its codes, or whose codewords have another size because another table left, would answer
wrongly without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from embcomp.collection.groups import Group
from embcomp.errors import CheckpointError
from embcomp.io.yaml_reading import listed
from embcomp.layers.named_parts import part_name, persistent_tensors, stored_tensors

MARK = "table"
_PREFIX = part_name(MARK, "")
_OWN = ("route.", "rows.", "unpooled_rows.", "combine.")

Shape = tuple[int, ...]


def mark_of(table: str) -> str:
    """The name of the empty entry that says that a table is there."""
    return part_name(MARK, table)


def marks(tables: Iterable[str]) -> dict[str, Tensor]:
    """The empty entries of tables."""
    return {mark_of(table): torch.zeros(0, dtype=torch.uint8) for table in tables}


def is_mark(name: str) -> bool:
    """Whether an entry only says that a table is there."""
    return name.rpartition(".")[2].startswith(_PREFIX)


def stored_shapes(groups: Sequence[Group]) -> dict[str, dict[str, Shape]]:
    """For each table, what must be there for it, by the names that a collection stores it under.

    What a method shares between its tables is needed by each of them.
    """
    found: dict[str, dict[str, Shape]] = {}
    for group in groups:
        names = [table.name for table in group.tables]
        found |= {name: {} for name in names}
        for physical in group.backend.physical_tables:
            shape = (physical.num_embeddings, physical.config().embedding_dim)
            for name in group.looked_up_in(physical):
                found[name][group.rows_name(physical.name)] = shape
        for part, module in group.modules():
            for local, tensor in stored_tensors(module, persistent_tensors(module)).items():
                owner = local.partition("@")[2].partition(".")[0]
                for name in [owner] if owner in names else names:
                    found[name][group.state_name(part, local)] = shape_of(tensor)
    return found


def check_tables(groups: Sequence[Group], state: Mapping[str, object], prefix: str) -> None:
    """Raise a CheckpointError where a table would be taken over in part, or wrongly.

    Tables that only one side has are torch's to refuse, or with `strict=False` to pass over.

    Args:
        groups: the methods of the collection that is filled.
        state: what it is filled with, and perhaps more.
        prefix: of the collection's entries there.
    """
    own = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    if not own:
        return
    there = {name.removeprefix(f"route.{_PREFIX}") for name in own if is_mark(name)}
    here = stored_shapes(groups)
    if not there and any(name.startswith(_OWN) for name in own):
        raise CheckpointError(
            f"the state does not say which tables it holds ({listed(sorted(here))} are wanted): an "
            "earlier embcomp wrote it, which knew a table by its place, so that ids would find "
            "other rows now. Use that one, or train again"
        )
    for table in (name for name in here if name in there):
        _check_whole(table, here, there, state, prefix)


def _check_whole(
    table: str,
    here: Mapping[str, Mapping[str, Shape]],
    there: set[str],
    state: Mapping[str, object],
    prefix: str,
) -> None:
    for name, shape in here[table].items():
        came = state.get(prefix + name)
        if came is not None and shape_of(came) == shape:
            continue
        shown = "missing" if came is None else f"{_shown(shape_of(came))} there"
        others = [
            f"{side} has {listed(sorted(names))} beside it"
            for side, names in (
                ("only the state", there - set(here)),
                ("only the collection", set(here) - there),
            )
            if names
        ]
        raise CheckpointError(
            f"table {table!r} cannot be taken over: its {name} is {shown} and "
            f"{_shown(shape)} here{''.join(f'; {other}' for other in others)}. Build the collection "
            "with the tables and the method's settings that the state was saved with"
        )


def shape_of(value: object) -> Shape:
    """The shape of a tensor, sharded or not; of anything else, that of a number."""
    if isinstance(value, ShardedTensor):
        return tuple(value.metadata().size)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _shown(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a number"
