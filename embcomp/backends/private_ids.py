"""Which ids have rows of their own, found by bisection among those that do, and what each id matters.

A list of the ids that have rows takes 4 bytes for each row, whatever the number of ids is. All of a batch is done at once,
by tensor operations whose shapes do not depend on values, so that no device is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from typing_extensions import override

from embcomp.layers.constant_tensors import Constant
from embcomp.layers.derived_tensors import Derived
from embcomp.layers.learned_buffers import LearnedBuffers

LARGEST_ID = 2**31 - 1
"""Ids from here on never have rows of their own: an id is stored in 32 bits."""
_BITS = 32
_LEAST = 1e-30  # of an owner's importance, so that others that do not matter either stay behind it


@dataclass(frozen=True, kw_only=True)
class PrivateTable:
    """How many of a table's ids have rows of their own.

    Attributes:
        name: the table.
        ids: that may have one, the first ones.
        rows: that there are, the first ones of the physical table; no more than ids.
    """

    name: str
    ids: int
    rows: int


class PrivateIds(LearnedBuffers):
    """The ids of each table that have rows of their own. Until importances say otherwise, they are the first ones.

    Attributes:
        ids: (private rows,) int32 those ids, rising within a table.
        rows: (private rows,) int32 the row of each, within its table; without importances they are in order.
        scores: (ids,) float32 the importance of each id that may have one.
        tables: those that have private rows.
        names: of these.

    Args:
        tables: the group.
        adapts: whether there are importances.
    """

    ids: Tensor
    rows: Tensor
    scores: Tensor

    def __init__(self, tables: Sequence[PrivateTable], *, adapts: bool) -> None:
        super().__init__()
        self.tables = [table for table in tables if table.rows]
        self.names = frozenset(table.name for table in self.tables)
        self.adapts = adapts
        self._row_starts = [0, *accumulate(table.rows for table in self.tables)]
        self._id_starts = [0, *accumulate(table.ids for table in self.tables)]
        self._starts = Constant(self._row_starts)
        self._firsts = Constant(self._id_starts[:-1])
        self._counts = Constant([table.ids for table in self.tables])
        own = [(table.name, table.rows) for table in self.tables]
        self.store_in_parts("ids", own)
        self.register_buffer("ids", torch.zeros(self._row_starts[-1], dtype=torch.int32))
        self._keys = Derived()
        if adapts:
            self.store_in_parts("rows", own)
            self.register_buffer("rows", torch.zeros(self._row_starts[-1], dtype=torch.int32))
            self.store_in_parts("scores", [(table.name, table.ids) for table in self.tables])
            self.register_buffer("scores", torch.zeros(self._id_starts[-1]))

    @override
    def reset_buffers(self) -> None:
        for place, table in enumerate(self.tables):
            first = torch.arange(table.rows, dtype=torch.int32, device=self.ids.device)
            self.ids[self._own(place)] = first
            if self.adapts:
                self.rows[self._own(place)] = first
        if self.adapts:
            self.scores.zero_()

    def _own(self, place: int) -> slice:
        return slice(self._row_starts[place], self._row_starts[place + 1])

    def _scored(self, place: int) -> slice:
        return slice(self._id_starts[place], self._id_starts[place + 1])

    def rows_of(self, ids: Tensor, places: Tensor) -> Tensor:
        """The private row of each id within its table, -1 where it has none.

        Args:
            ids: int64 of any shape.
            places: its table among `tables`, -1 for another; broadcastable to ids.
        """
        if torch.compiler.is_compiling():
            at, found = self._bisected(ids, places)
        else:
            keys, most = self._keys.of([self.ids], self._all_keys), len(self.ids) - 1
            may = (ids >= 0) & (ids < LARGEST_ID) & (places >= 0)
            wanted = torch.where(may, ids + places.bitwise_left_shift(_BITS), -1)
            at = torch.searchsorted(keys, wanted).clamp_(max=most)
            found = keys[at] == wanted
        own = self.rows[at].long() if self.adapts else at - self._starts.on(ids.device)[places]
        return torch.where(found, own, -1)

    def _all_keys(self) -> Tensor:
        """(private rows,) int64 the ids with their tables before them, rising."""
        starts = self._starts.on(self.ids.device)
        places = torch.arange(len(self.tables), device=self.ids.device).repeat_interleave(
            starts.diff(), output_size=self.ids.shape[0]
        )
        return self.ids.long() + places.bitwise_left_shift(_BITS)

    def _bisected(self, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Where ids stand in `ids`, and whether they do, in operations that every exporter knows.

        Args:
            ids: int64 of any shape.
            places: as in `rows_of`.
        """
        starts, most = self._starts.on(ids.device), self._row_starts[-1] - 1
        table = places.clamp(min=0)
        low = torch.zeros_like(ids) + starts[table]
        high = torch.zeros_like(ids) + starts[table + 1]
        end = high
        for _ in range(max(table.rows for table in self.tables).bit_length()):
            middle = (low + high) >> 1
            is_less = (self.ids[middle.clamp(max=most)].long() < ids) & (low < high)
            low = torch.where(is_less, middle + 1, low)
            high = torch.where(is_less, high, middle)
        at = low.clamp(max=most)
        return at, (low < end) & (self.ids[at].long() == ids) & (places >= 0)

    @torch.no_grad()
    def add(self, ids: Tensor, places: Tensor, scores: Tensor) -> None:
        """Add to importances.

        Args:
            ids: (N,) int64; those that can have no row of their own are left out.
            places: (N,) int64 the table of each among `tables`.
            scores: (N,) not negative.
        """
        self.ensure_filled()
        device = ids.device
        may = (ids >= 0) & (ids < self._counts.on(device)[places])
        at = torch.where(may, ids + self._firsts.on(device)[places], 0)
        self.scores.index_add_(0, at, torch.where(may, scores.to(self.scores.dtype), 0.0))

    @torch.no_grad()
    def best(self, place: int, margin: float) -> Tensor:
        """(rows of a table,) int64 the ids that matter most, rising.

        Args:
            place: of the table among `tables`.
            margin: what the importances of those that have rows now are multiplied by.
        """
        self.ensure_filled()
        scores = self.scores[self._scored(place)].clone()
        owners = self.ids[self._own(place)].long()
        scores[owners] = (scores[owners] * margin).clamp_(min=_LEAST)
        return scores.topk(self.tables[place].rows, sorted=False).indices.sort().values

    @torch.no_grad()
    def give_rows(self, place: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Let these ids have the rows of a table: those that have one keep it.

        Args:
            place: of the table among `tables`.
            ids: (rows,) int64, rising.

        Returns:
            (rows,) int64 the row of each, every row once; (rows,) bool which had none.
        """
        own, most = self._own(place), self.tables[place].rows - 1
        before, rows = self.ids[own].long(), self.rows[own].long()
        at = torch.searchsorted(before, ids).clamp_(max=most)
        stays = before[at] == ids
        kept = rows[at]
        # Rows that were left are given to newcomers in order: there are as many of both.
        is_kept = torch.zeros(most + 2, dtype=torch.bool, device=ids.device)
        is_kept[torch.where(stays, kept, most + 1)] = True
        left = is_kept[:-1].to(torch.uint8).argsort(stable=True)
        newcomers = stays.to(torch.uint8).argsort(stable=True)
        given = torch.empty_like(kept)
        given[newcomers] = left
        rows = torch.where(stays, kept, given)
        self.ids[own], self.rows[own] = ids.to(torch.int32), rows.to(torch.int32)
        return rows, ~stays

    @torch.no_grad()
    def fade(self, decay: float) -> None:
        """Multiply all importances."""
        self.scores.mul_(decay)
