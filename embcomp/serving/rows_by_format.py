"""Rows for other devices than the CPU: all tables of one width and type in one tensor.

There a launch costs more than what it does for a small batch. So the rows of all look-ups of a width and
type are found, restored and summed together: the number of operations does not grow with the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from typing_extensions import Self

from embcomp.collection.groups import Group
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.routing import per_value
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
        begins: list[int] = []
        for n, members in enumerate(names.values()):
            rows, first = _joined([tables[name] for name in members])
            keys = [key for key, name in owners.items() if name in first]
            self._keys.append(keys)
            self.register_buffer(f"rows_{n}", rows)
            begins += [first[owners[key]] for key in keys]
        self._order = [key for keys in self._keys for key in keys]
        self._first = Constant(begins) if any(begins) else None

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
        ends = features.offset_per_key()
        ids = features.values().to(torch.int64)
        if self._first is not None:
            ids = ids + per_value(self._first.on(ids.device), features)
        offsets, weights = features.offsets().to(torch.int64), features.weights_or_none()
        found, at = [], 0
        for n, own in enumerate(self._keys):
            start, at = at, at + len(own)
            values = slice(ends[start], ends[at])
            bags = offsets[start * batch : at * batch + 1]
            summed = self._summed(
                n,
                ids[values],
                bags - ends[start] if ends[start] else bags,
                None if weights is None else weights[values],
            )
            by_row = summed.view(len(own), batch, -1).transpose(0, 1)  # (B, look-ups, dim)
            found.append(by_row.reshape(batch, len(own) * summed.shape[1]))
        return KeyedTensor(
            keys=self._order,
            length_per_key=[dim for (dim, _), own in zip(self._formats, self._keys) for _ in own],
            values=found[0] if len(found) == 1 else torch.cat(found, dim=1),
        )

    def _summed(self, n: int, ids: Tensor, bags: Tensor, weights: Tensor | None) -> Tensor:
        """(look-ups * B, dim) sums of rows of one format; bag `i` is `ids[bags[i]:bags[i + 1]]`."""
        stored, (dim, row_type) = self.get_buffer(f"rows_{n}"), self._formats[n]
        if row_type == "fp32":
            return embedding_bag(
                ids,
                stored,
                bags,
                mode="sum",
                per_sample_weights=weights,
                include_last_offset=True,
            )
        rows = unpack(stored.index_select(0, ids), dim, row_type)
        if weights is not None:
            rows = rows * weights.unsqueeze(1)
        # Bags follow from lengths, so nothing need be checked, which would wait for the device.
        return torch.segment_reduce(rows, "sum", offsets=bags, initial=0, unsafe=True)


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
