"""Where a method puts the ids of its tables: which physical rows they reach, and who shares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.collection.groups import Group
from embcomp.tables.row_types import RowType, row_bytes
from embcomp.tables.specs import TableSpec

_CHUNK = 1 << 16  # ids that are routed together


@dataclass(frozen=True, kw_only=True)
class RowSharing:
    """Where the ids of a method's tables lie.

    Attributes:
        placed: by table, the look-ups of an id: physical table and (num_embeddings,) rows.
        reached: by table and physical table, the rows that its ids reach, ascending.
        users: by physical table, (rows,) how many logical tables reach each row.
    """

    placed: Mapping[str, Sequence[tuple[str, Tensor]]]
    reached: Mapping[str, Mapping[str, Tensor]]
    users: Mapping[str, Tensor]

    @classmethod
    def of(cls, group: Group) -> RowSharing:
        """Look up every id of a group's tables and count who shares its rows."""
        placed = {table.name: rows_of_ids(group, table) for table in group.tables}
        reached = {name: _distinct(parts) for name, parts in placed.items()}
        users = {
            t.name: torch.zeros(t.num_embeddings, dtype=torch.int64)
            for t in group.backend.physical_tables
        }
        for by_table in reached.values():
            for name, rows in by_table.items():
                users[name][rows] += 1
        return cls(placed=placed, reached=reached, users=users)

    def bytes_by_table(self, group: Group, row_types: Mapping[str, RowType]) -> dict[str, float]:
        """A method's serving bytes, shared out to its tables.

        Rows belong to those that reach them, in equal parts; rows that nobody reaches to those that
        look up in their table. Codes, masks and the like belong to their owners, or to the table that
        they are named after.

        Args:
            group: the method as built.
            row_types: how the rows of each physical table are stored.
        """
        sizes = dict.fromkeys(self.placed, 0.0)
        for table in group.backend.physical_tables:
            size = row_bytes(table.embedding_dim, row_types[table.name])
            users = self.users[table.name]
            lookup = [name for name in sizes if table.name in self.reached[name]]
            for name in lookup:
                rows = self.reached[name][table.name]
                sizes[name] += size * float((1 / users[rows].double()).sum())
                sizes[name] += size * int((users == 0).sum()) / len(lookup)
        for tensor in group.config.footprint(group.tables).tensors:
            if not tensor.lookup:
                own = [n for n in sizes if tensor.name.partition(".")[0] == n] or list(sizes)
                owners = tensor.owners or [(name, 1) for name in own]
                whole = sum(part for _, part in owners)
                for name, part in owners:
                    sizes[name] += tensor.serve_bytes * part / whole
        return sizes


def rows_of_ids(group: Group, table: TableSpec) -> list[tuple[str, Tensor]]:
    """Where a method puts the ids of a table.

    Args:
        group: the method as built.
        table: one of its tables.

    Returns:
        For each physical look-up of an id, the physical table and (num_embeddings,) rows in it; a
        negative row where the look-up is skipped.
    """
    owners = {key: t.name for t in group.backend.physical_tables for key in t.keys}
    feature = table.feature_names[0]
    keys = [instance.key for instance in group.instances]
    own = next(
        n for n, i in enumerate(group.instances) if i.table is table and i.feature == feature
    )
    size = group.backend.ids_per_value
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, table.num_embeddings, _CHUNK):
        ids = torch.arange(start, min(start + _CHUNK, table.num_embeddings))
        batch = KeyedJaggedTensor(
            keys=keys,
            values=ids,
            lengths=torch.tensor([n == own for n in range(len(keys))])
            .int()
            .repeat_interleave(len(ids)),
            stride=len(ids),
            length_per_key=[len(ids) if n == own else 0 for n in range(len(keys))],
        )
        routed = group.backend.route(batch)
        counts, values = routed.length_per_key(), routed.values()
        for key, part in zip(routed.keys(), values.split(counts)):
            if len(part):
                parts.setdefault(key, []).append(part.view(len(ids), size))
    return [
        (owners[key], column)
        for key, pieces in parts.items()
        for column in torch.cat(pieces).to(torch.int64).unbind(dim=1)
    ]


def _distinct(parts: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The rows that are reached in each physical table, once each."""
    joined: dict[str, list[Tensor]] = {}
    for name, rows in parts:
        joined.setdefault(name, []).append(rows[rows >= 0])
    return {name: torch.unique(torch.cat(rows)) for name, rows in joined.items()}
