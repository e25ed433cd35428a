"""Rows that were looked up one by one, combined by (table, feature) where these differ in length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp.backends.base import Backend
from embcomp.collection.groups import Group
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.rows_by_key import CombinesEach, RowsByKey


class EachPair:
    """One method's way from the rows of keys to the embeddings of each (table, feature).

    Args:
        group: the method.
    """

    def __init__(self, group: Group) -> None:
        self._needs_context = group.backend.needs_context
        self._dims = [instance.table.embedding_dim for instance in group.instances]
        pair_of = _pairs_of_keys(group)
        count = len(group.instances)
        self.keys = list(group.backend.keys)
        self.pairs = [pair_of[key] for key in self.keys]
        """For each key, the (table, feature) that it is looked up for."""
        self._own = [[k for k in self.keys if pair_of[k] == pair] for pair in range(count)]
        self._in_order = [key for own in self._own for key in own] == self.keys
        takes_parts = isinstance(group.backend.combine, nn.Identity | CombinesEach)
        self.joined = [tuple(own) for own in self._own if own and self._in_order and takes_parts]
        """Keys whose rows are wanted side by side."""

    def combine(
        self, combine: nn.Module, rows: RowsByKey, looked_up: LookupContext
    ) -> list[Tensor]:
        """For each (table, feature), (N of its values, embedding_dim).

        Args:
            combine: the method's.
            rows: of its keys.
            looked_up: what they were looked up for.
        """
        if self._in_order and isinstance(combine, nn.Identity):
            return self._parts(rows, looked_up)
        if self._in_order and isinstance(combine, CombinesEach):
            return combine.each(self._parts(rows, looked_up), looked_up)
        return self._padded(combine, rows, looked_up)

    def _parts(self, rows: RowsByKey, looked_up: LookupContext) -> list[Tensor]:
        counts = looked_up.features.length_per_key()[looked_up.own]
        none = next(iter(rows.rows.values())).new_zeros
        return [rows.side_by_side(own) if own else none(n, 0) for own, n in zip(self._own, counts)]

    def _padded(
        self, combine: nn.Module, rows: RowsByKey, looked_up: LookupContext
    ) -> list[Tensor]:
        """Of a method that takes rectangles alone."""
        most, parts = looked_up.rows, [rows.side_by_side([key]) for key in self.keys]
        whole = torch.cat([F.pad(part, (0, 0, 0, most - len(part))) for part in parts], dim=1)
        found = combine(whole, looked_up) if self._needs_context else combine(whole)
        counts = looked_up.features.length_per_key()[looked_up.own]
        return [part[:n] for part, n in zip(found.split(self._dims, dim=1), counts)]


def _pairs_of_keys(group: Group) -> dict[str, int]:
    """For each look-up, the position of its (table, feature)."""
    places = {(each.table.name, each.feature): n for n, each in enumerate(group.instances)}
    return {
        str(lookup): places[lookup.table, lookup.feature]
        for table in group.backend.physical_tables
        for lookup in table.lookups
    }


def key_widths(backend: Backend) -> list[tuple[str, int]]:
    """The physical look-ups in order, with their true width."""
    owner = {key: table for table in backend.physical_tables for key in table.keys}
    return [(key, owner[key].embedding_dim) for key in backend.keys]
