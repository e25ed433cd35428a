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
from embcomp.layers.host_values import on_device
from embcomp.layers.routing import plus_per_key
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
        self._skips = any(group.backend.skips_negative_ids for group in groups)
        self._keys: list[list[str]] = []
        begins: list[int] = []
        for n, members in enumerate(names.values()):
            rows, first = _joined([tables[name] for name in members], zeros=self._skips)
            keys = [key for key, name in owners.items() if name in first]
            self._keys.append(keys)
            self.register_buffer(f"rows_{n}", rows)
            begins += [first[owners[key]] for key in keys]
        self._order = [key for keys in self._keys for key in keys]
        self._wanted = {key: tables[name].dim for key, name in owners.items()}
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
        if self._skips:
            ids = ids.clamp(min=-1)  # the row of zeros before a table's own
        if self._first is not None:
            ids = plus_per_key(ids, self._first.on(ids.device), features)
        weights, types = features.weights_or_none(), {row_type for _, row_type in self._formats}
        bags: dict[
            bool, Tensor
        ] = {}  # of float32 rows where they begin, of others how long they are
        if "fp32" in types:
            bags[True] = self._begins(features, ends)
        if types != {"fp32"}:
            bags[False] = features.lengths().view(-1, batch)
        found: dict[str, Tensor] = {}
        at = 0
        for n, own in enumerate(self._keys):
            keys_of, at = slice(at, at + len(own)), at + len(own)
            values = slice(ends[keys_of.start], ends[at])
            summed = self._summed(
                n,
                ids[values],
                bags[self._formats[n][1] == "fp32"][keys_of].reshape(-1),
                None if weights is None else weights[values].float(),
            )
            parts = summed.view(len(own), batch, -1)
            found |= zip(own, parts.unbind())
        if list(self._wanted) == self._keys[0]:
            values_of = parts.transpose(0, 1).reshape(batch, -1)
        else:
            values_of = torch.cat([found[key] for key in self._wanted], dim=1)
        return KeyedTensor(
            keys=list(self._wanted), length_per_key=list(self._wanted.values()), values=values_of
        )

    def _begins(self, features: KeyedJaggedTensor, ends: Sequence[int]) -> Tensor:
        """(look-ups, B) int64 where bags begin among the ids of their format."""
        begins = features.offsets()[:-1].view(len(self._order), -1)
        if len(self._keys) == 1:
            return begins.to(torch.int64)
        firsts = [ends[self._order.index(own[0])] for own in self._keys for _ in own]
        return begins - on_device(firsts, begins.device).unsqueeze(1)

    def _summed(self, n: int, ids: Tensor, bags: Tensor, weights: Tensor | None) -> Tensor:
        """(look-ups * B, dim) sums of rows of one format.

        Args:
            n: the format.
            ids: of all bags, one after another.
            bags: (look-ups * B,) where each begins, of float32 rows; else how long each is.
            weights: of the ids.
        """
        stored, (dim, row_type) = self.get_buffer(f"rows_{n}"), self._formats[n]
        if row_type == "fp32":
            return embedding_bag(ids, stored, bags, mode="sum", per_sample_weights=weights)
        rows = unpack(stored.index_select(0, ids), dim, row_type)
        if weights is not None:
            rows = rows * weights.unsqueeze(1)
        # Bags are what they are, so nothing need be checked, which would wait for the device.
        return torch.segment_reduce(rows, "sum", lengths=bags, initial=0, unsafe=True)


def _joined(tables: Sequence[StoredTable], *, zeros: bool) -> tuple[Tensor, dict[str, int]]:
    """The rows of tables of one format, and where each table's begin; behind a row of zeros if wanted."""
    counts = [table.rows.shape[0] for table in tables]
    shape = (sum(counts) + len(tables) * zeros, *tables[0].rows.shape[1:])
    rows = torch.empty(shape, dtype=tables[0].rows.dtype)
    first, at = {}, 0
    for table, count in zip(tables, counts):
        if zeros:
            rows[at].zero_()
            at += 1
        table.rows.read_into(rows[at : at + count])
        first[table.name] = at
        at += count
    return rows, first
