"""Where a method puts the ids of its tables: which physical rows they reach, and who shares them.

What is known of a table's rows lies in a temporary file, and is looked at a part at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.collection.groups import Group
from embcomp.io.mapped_arrays import temporary_bytes, temporary_mask
from embcomp.tables.row_types import RowType, row_bytes
from embcomp.tables.specs import TableSpec

_CHUNK = 1 << 16  # ids that are routed together
_ROWS_AT_ONCE = 1 << 20  # whose users are counted together


@dataclass(frozen=True, kw_only=True)
class RowSharing:
    """Where the ids of a method's tables lie.

    Attributes:
        reached: by table and physical table, (rows,) bool which rows its ids reach.
        users: by physical table, (rows,) int32 how many logical tables reach each row.
    """

    reached: Mapping[str, Mapping[str, Tensor]]
    users: Mapping[str, Tensor]

    @classmethod
    def of(cls, group: Group) -> RowSharing:
        """Look up every id of a group's tables and count who shares its rows."""
        rows = {table.name: table.num_embeddings for table in group.backend.physical_tables}
        reached: dict[str, dict[str, Tensor]] = {}
        for table in group.tables:
            own = reached[table.name] = {}
            for _, placed in placed_blocks(group, table):
                for name, part in placed:
                    if name not in own:
                        own[name] = _mask(rows[name], f"which rows {table.name!r} reaches")
                    own[name][part[part >= 0]] = True
        users = {name: _zeros(count, f"who uses {name!r}") for name, count in rows.items()}
        for by_table in reached.values():
            for name, mask in by_table.items():
                for counted, part in _parts(users[name], mask):
                    counted += part
        return cls(reached=reached, users=users)

    def rows(self, table: str) -> int:
        """How many physical rows a table's ids reach; shared ones count once."""
        return sum(map(count_true, self.reached[table].values()))

    def shared_rows(self, table: str) -> int:
        """How many of them ids of other tables reach as well."""
        return sum(
            int((own & (users > 1)).sum())
            for name, mask in self.reached[table].items()
            for own, users in _parts(mask, self.users[name])
        )

    def bytes_by_table(self, group: Group, row_types: Mapping[str, RowType]) -> dict[str, float]:
        """A method's serving bytes, shared out to its tables.

        Rows belong to those that reach them, in equal parts; rows that nobody reaches to those that
        look up in their table. Codes, masks and the like belong to their owners, or to the table that
        they are named after.

        Args:
            group: the method as built.
            row_types: how the rows of each physical table are stored.
        """
        sizes = dict.fromkeys(self.reached, 0.0)
        for table in group.backend.physical_tables:
            size = row_bytes(table.embedding_dim, row_types[table.name])
            users = self.users[table.name]
            unused = sum(int((own == 0).sum()) for (own,) in _parts(users))
            lookup = [name for name in sizes if table.name in self.reached[name]]
            for name in lookup:
                sizes[name] += size * _shares(self.reached[name][table.name], users)
                sizes[name] += size * unused / len(lookup)
        for tensor in group.config.footprint(group.tables).tensors:
            if not tensor.lookup:
                own = [n for n in sizes if tensor.name.partition(".")[0] == n] or list(sizes)
                owners = tensor.owners or [(name, 1) for name in own]
                whole = sum(part for _, part in owners)
                for name, part in owners:
                    sizes[name] += tensor.serve_bytes * part / whole
        return sizes


def _shares(mask: Tensor, users: Tensor) -> float:
    """The sum over rows of one over their users."""
    parts = _parts(mask, users)
    return sum(float((1 / own[reached].double()).sum()) for reached, own in parts)


def count_true(mask: Tensor) -> int:
    """How many of a mask that may be long are true."""
    return sum(int(part.sum()) for (part,) in _parts(mask))


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equally long tensors, some rows of each at a time."""
    return zip(*(each.split(_ROWS_AT_ONCE) for each in tensors))


def _mask(count: int, what: str) -> Tensor:
    return torch.from_numpy(temporary_mask(count, what))


def _zeros(count: int, what: str) -> Tensor:
    """(count,) int32."""
    return torch.from_numpy(temporary_bytes(4 * count, what)).view(torch.int32)


def placed_blocks(group: Group, table: TableSpec) -> Iterator[tuple[int, list[tuple[str, Tensor]]]]:
    """Where a method puts the ids of a table, a part of them at a time.

    Args:
        group: the method as built.
        table: one of its tables.

    Yields:
        The first id, and for each physical look-up of an id, the physical table and (ids,) int64 rows in
        it; a negative row where the look-up is skipped. Look-ups come in the same order each time.
    """
    owners = {key: t.name for t in group.backend.physical_tables for key in t.keys}
    feature = table.feature_names[0]
    keys = [instance.key for instance in group.instances]
    own = next(
        n for n, i in enumerate(group.instances) if i.table is table and i.feature == feature
    )
    size = group.backend.ids_per_value
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
        parts = zip(routed.keys(), routed.values().split(routed.length_per_key()))
        yield (
            start,
            [
                (owners[key], column)
                for key, part in parts
                if len(part)
                for column in part.view(len(ids), size).to(torch.int64).unbind(dim=1)
            ],
        )
