"""Rows for other devices than the CPU: all tables of one width and type in one tensor.

There a launch costs more than what it does for a small batch. So the rows of all look-ups of a width and
type are found, restored and summed together: the number of operations does not grow with the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from typing_extensions import Self

from embcomp.collection.groups import Group
from embcomp.serving.serving_rows import StoredTable, lookups
from embcomp.tables.row_types import RowType, unpack

Format = tuple[int, RowType]
"""The width of rows and their type."""


class RowsByFormat(nn.Module):
    """Rows as plain tensors, one for each width and type.

    Args:
        groups: the methods whose look-ups are made here.
        tables: their physical tables, by name.
    """

    def __init__(self, groups: Sequence[Group], tables: Mapping[str, StoredTable]) -> None:
        super().__init__()
        owners = lookups(groups)
        names: dict[Format, list[str]] = {}
        for name in dict.fromkeys(owners.values()):
            names.setdefault((tables[name].dim, tables[name].row_type), []).append(name)
        self._formats = list(names)
        self._keys: list[list[str]] = []
        for n, members in enumerate(names.values()):
            rows, first = _joined([tables[name] for name in members])
            keys = [key for key, name in owners.items() if name in first]
            self._keys.append(keys)
            self.register_buffer(f"rows_{n}", rows)
            self.register_buffer(f"first_{n}", torch.tensor([first[owners[key]] for key in keys]))
        self._order = [key for keys in self._keys for key in keys]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `module.half()` must not change what is stored: rows are moved, never cast.
        device = fn(torch.zeros(0)).device
        for name, stored in self._buffers.items():
            assert stored is not None
            self._buffers[name] = stored.to(device)
        return self

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Sum the rows of every bag, weighted where the bags are: (B, sum of dims)."""
        keys, batch = features.keys(), features.stride()
        if keys != self._order:
            features = features.permute([keys.index(key) for key in self._order])
        ends = [0, *features.offset_per_key()[1:]]
        found, at = [], 0
        for n, own in enumerate(self._keys):
            stop = at + len(own)
            values = slice(ends[at], ends[stop])
            weights = features.weights_or_none()
            found.append(
                self._summed(
                    n,
                    features.values()[values],
                    features.lengths()[at * batch : stop * batch],
                    None if weights is None else weights[values],
                    batch,
                )
            )
            at = stop
        return KeyedTensor(
            keys=self._order,
            length_per_key=[dim for (dim, _), own in zip(self._formats, self._keys) for _ in own],
            values=found[0] if len(found) == 1 else torch.cat(found, dim=1),
        )

    def _summed(
        self, n: int, ids: Tensor, lengths: Tensor, weights: Tensor | None, batch: int
    ) -> Tensor:
        """(B, sum of dims) of the look-ups of one format, whose bags come key after key."""
        stored, first = self.get_buffer(f"rows_{n}"), self.get_buffer(f"first_{n}")
        (dim, row_type), count = self._formats[n], len(self._keys[n])
        bags = torch.arange(batch * count, device=ids.device).repeat_interleave(
            lengths.to(torch.int64), output_size=len(ids)
        )
        key = bags // max(batch, 1)
        rows = unpack(stored.index_select(0, ids.to(torch.int64) + first[key]), dim, row_type)
        if weights is not None:
            rows = rows * weights.unsqueeze(1)
        summed = rows.new_zeros(batch * count, dim)
        summed.index_add_(0, (bags - key * batch) * count + key, rows)
        return summed.view(batch, count * dim)


def _joined(tables: Sequence[StoredTable]) -> tuple[Tensor, dict[str, int]]:
    """The rows of tables of one format, and where each table's begin."""
    counts = [table.rows.shape[0] for table in tables]
    rows = torch.empty((sum(counts), *tables[0].rows.shape[1:]), dtype=tables[0].rows.dtype)
    first, at = {}, 0
    for table, count in zip(tables, counts):
        table.rows.read_into(rows[at : at + count])
        first[table.name] = at
        at += count
    return rows, first
