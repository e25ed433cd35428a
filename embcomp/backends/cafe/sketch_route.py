"""The route of `cafe`: hot ids to rows of their own, all others to hashed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.backends.cafe.hot_sketch import WAYS, HotSketch
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.held_pieces import HeldPieces, between_steps
from embcomp.layers.host_values import reads_wait
from embcomp.layers.routing import beside_ids, renamed
from embcomp.layers.watched_gradients import GradientWatch, SeenIds

_LARGEST = 2**63 - 1  # hashes so long that ids of a table meet once in 2**63 pairs


@dataclass(frozen=True, kw_only=True)
class SketchedTable:
    """How the rows of a table are dealt out.

    Args:
        name: the table, logical and physical.
        hot: rows of hot ids, the first ones; a multiple of `WAYS`.
        shared: rows behind them.
        num_features: features that are looked up in the table.
    """

    name: str
    hot: int
    shared: int
    num_features: int


class SketchRoute(nn.Module):
    """Looks hot ids up in a sketch, which it keeps.

    Attributes:
        sketch: what is hot.
        watch: what backward passes told since the last call of `write_rows`.

    Args:
        keys: names of the look-ups, feature after feature.
        tables: in the order of the look-ups.
        sketch: of these tables.
        seed: salts the hashes.
    """

    def __init__(
        self, keys: Sequence[str], tables: Sequence[SketchedTable], sketch: HotSketch, *, seed: int
    ) -> None:
        super().__init__()
        self.sketch = sketch
        self.watch = GradientWatch()
        self._pieces = HeldPieces()
        self._keys = list(keys)
        self._adapting = [table for table in tables if table.hot]
        owners = [table for table in tables for _ in range(table.num_features)]
        self._owners = owners
        buckets = {table.name: table.hot // WAYS for table in tables}
        first, firsts = 0, {}
        for table in tables:
            firsts[table.name] = first
            first += buckets[table.name]
        self._cell_salts = Constant([table_salt(seed, t.name, 0) for t in owners])
        self._row_salts = Constant([table_salt(seed, t.name, 1) for t in owners])
        self._buckets = Constant([buckets[t.name] for t in owners])
        self._firsts = Constant([firsts[t.name] for t in owners])
        self._hot = Constant([t.hot for t in owners])
        self._shared = Constant([t.shared for t in owners])
        self._constants = Constant.stacked(
            *(self._row_salts, self._cell_salts, self._shared, Constant([_LARGEST] * len(owners))),
            *(self._hot, self._buckets, self._firsts),
        )
        places = {table.name: n for n, table in enumerate(self._adapting)}
        self._places = Constant([places.get(t.name, 0) for t in owners])

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        self.sketch.ensure_filled()
        ids, own = beside_ids(features, self._constants)
        hot, buckets, firsts = own[4:]
        times = 2 if self._adapting else 1  # the hash of a cell beside that of a row
        hashes = hash_rows(ids, own[:times], own[2 : 2 + times])
        rows = hashes[0].add_(hot)
        if self._adapting:
            bucket = firsts + hashes[1].remainder_(buckets.clamp(min=1))
            has_buckets = buckets > 0
            is_hot, cell = self.sketch.cell(ids, torch.where(has_buckets, bucket, 0))
            rows = torch.where(is_hot & has_buckets, cell - WAYS * firsts, rows)
        return renamed(features, self._keys, rows.reshape(-1))

    @torch.no_grad()
    def write_rows(self, holder: nn.Module) -> None:
        """Take what the last steps' gradients say into the sketch, and give rows to what has become hot.

        Args:
            holder: the collection that holds the rows, sharded or not; all ranks call it.
        """
        if not self.sketch.adapts or not self._adapting:
            return
        device = self.sketch.hot.device
        with between_steps(device):
            seen = self.watch.take(holder, [table.hot > 0 for table in self._owners], device)
            if seen is not None:
                self._adapt(holder, seen)
                self._age(seen)

    def _age(self, seen: SeenIds) -> None:
        lookups = dict.fromkeys((table.name for table in self._adapting), 0)
        for count, owner in zip(seen.counts, self._owners):
            if owner.hot:
                lookups[owner.name] += count
        self.sketch.age(list(lookups.values()))

    def _adapt(self, holder: nn.Module, seen: SeenIds) -> None:
        """Take ids into the sketch, and give rows to what has become hot.

        Args:
            holder: what holds the rows.
            seen: ids of tables with hot rows.
        """
        ids, device = seen.ids, seen.ids.device
        cell_salts, buckets, firsts, row_salts, hot, shared, places = (
            constant.on(device)[seen.keys]
            for constant in (
                self._cell_salts,
                self._buckets,
                self._firsts,
                self._row_salts,
                self._hot,
                self._shared,
                self._places,
            )
        )
        keys = hash_rows(ids, cell_salts, _LARGEST)
        risen = self.sketch.add(ids, keys, firsts + keys.remainder(buckets), places, seen.scores)
        if not reads_wait(device) and not bool(risen.rises.any()):
            return
        sources = hash_rows(risen.ids, row_salts, shared).add_(hot)
        targets = risen.cells - WAYS * firsts
        split = zip(*(each.split(seen.counts) for each in (sources, targets, risen.rises)))
        for table, (source, target, rises) in zip(self._owners, split):
            if source.shape[0]:
                pieces = self._pieces.find(holder, table.name, "cafe")
                pieces.copy_rows(source, target, rises)
