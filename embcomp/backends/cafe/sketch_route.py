"""The route of `cafe`: hot ids to rows of their own, all others to hashed ones; and what tells it which are hot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.backends.cafe.hot_sketch import WAYS, HotSketch
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.held_pieces import HeldPieces, between_steps
from embcomp.layers.host_values import on_device, reads_wait
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.routing import beside_ids, renamed

_KEYS = Constant([2**63 - 1])  # hashes so long that ids of a table meet once in 2**63 pairs


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


@dataclass
class _Watched:
    """The ids of a forward pass, key by key, and what its backward pass made of them.

    Attributes:
        ids: (N of the key's values,) int64 each.
        norms: (N,) float32 lengths of their rows' gradients; None before they are there.
    """

    ids: list[Tensor]
    norms: list[Tensor | None]


class SketchRoute(nn.Module):
    """Looks hot ids up in a sketch, which it keeps.

    Attributes:
        sketch: what is hot.
        watched: forward passes since the last call of `write_rows`.

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
        self.watched: list[_Watched] = []
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
        places = {table.name: n for n, table in enumerate(self._adapting)}
        self._places = Constant([places.get(t.name, 0) for t in owners])

    def __getstate__(self) -> dict[str, Any]:
        # What was watched hangs on a step that is under way.
        return {**self.__dict__, "watched": []}

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        self.sketch.ensure_filled()
        wanted = (self._row_salts, self._hot, self._shared)
        ids, (salts, hot, shared) = beside_ids(features, wanted)
        rows = hash_rows(ids, salts, shared).add_(hot)
        if self._adapting:
            wanted = (self._cell_salts, self._buckets, self._firsts)
            ids, (salts, buckets, firsts) = beside_ids(features, wanted)
            keys = hash_rows(ids, salts, _KEYS.on(ids.device))
            bucket = firsts + keys.remainder_(buckets.clamp(min=1))
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
        watched, self.watched = self.watched, []
        if not self.sketch.adapts or not self._adapting:
            return
        with between_steps(self.sketch.hot.device):
            self._learn(holder, watched)

    def _learn(self, holder: nn.Module, watched: Sequence[_Watched]) -> None:
        parts = [_of_key(watched, key) for key in range(len(self._owners))]
        if isinstance(holder, ShardedEmbeddingBagCollection) and dist.get_world_size() > 1:
            parts = _over_ranks(parts, self.sketch.hot.device)
        counts = [len(ids) if table.hot else 0 for (ids, _), table in zip(parts, self._owners)]
        if not any(counts):
            return
        parts = [part for part, count in zip(parts, counts) if count]
        ids = torch.cat([own for own, _ in parts])
        norms = torch.cat([own for _, own in parts])
        self._adapt(holder, counts, ids, norms)
        seen = [
            sum(count for count, owner in zip(counts, self._owners) if owner.name == table.name)
            for table in self._adapting
        ]
        self.sketch.age(seen)

    def _adapt(self, holder: nn.Module, counts: Sequence[int], ids: Tensor, norms: Tensor) -> None:
        """The same of joined ids.

        Args:
            holder: what holds the rows.
            counts: how many of the ids are each key's.
            ids: (N,) int64.
            norms: (N,) float32.
        """
        device = ids.device
        own = on_device(counts, device)
        key = torch.arange(len(counts), device=device).repeat_interleave(
            own, output_size=ids.shape[0]
        )
        sums = norms.new_zeros(len(counts)).index_add_(0, key, norms)
        scores = norms * (own / sums.clamp(min=1e-30))[key]  # 1 on average, for each key
        cell_salts, buckets, firsts, row_salts, hot, shared, places = (
            constant.on(device)[key]
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
        keys = hash_rows(ids, cell_salts, _KEYS.on(device))
        risen = self.sketch.add(ids, keys, firsts + keys.remainder(buckets), places, scores)
        if not reads_wait(device) and not bool(risen.rises.any()):
            return
        sources = hash_rows(risen.ids, row_salts, shared).add_(hot)
        targets = risen.cells - WAYS * firsts
        split = zip(*(each.split(list(counts)) for each in (sources, targets, risen.rises)))
        for table, (source, target, rises) in zip(self._owners, split):
            if source.shape[0]:
                pieces = self._pieces.find(holder, table.name, "cafe")
                pieces.copy_rows(source, target, rises)


class WatchedRows(nn.Module):
    """Hands rows on as they are, and tells the route in training how long their gradients were.

    Args:
        route: that is told.
        dims: for each (table, feature), the width of its rows.
    """

    def __init__(self, route: SketchRoute, dims: Sequence[int]) -> None:
        super().__init__()
        self._route = (route,)  # which is the route's place, not a child of this
        self._dims = list(dims)

    @override
    def forward(self, rows: Tensor, looked_up: LookupContext) -> Tensor:
        if not self._watches([rows]):
            return rows
        rows, watched = rows.view_as(rows), self._begin(looked_up)

        def tell(gradient: Tensor) -> None:
            for key, part in enumerate(gradient.split(self._dims, dim=1)):
                watched.norms[key] = _lengths(part[: watched.ids[key].shape[0]])

        rows.register_hook(tell)
        return rows

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Of each (table, feature) by itself (`CombinesEach`)."""
        if not self._watches(parts):
            return list(parts)
        watched = self._begin(looked_up)
        return [self._watched(key, part, watched) for key, part in enumerate(parts)]

    def _watched(self, key: int, part: Tensor, watched: _Watched) -> Tensor:
        def tell(gradient: Tensor) -> None:
            watched.norms[key] = _lengths(gradient)

        part = part.view_as(part)
        if part.requires_grad:
            part.register_hook(tell)
        return part

    def _watches(self, parts: Sequence[Tensor]) -> bool:
        learns = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return learns and any(part.requires_grad for part in parts)

    def _begin(self, looked_up: LookupContext) -> _Watched:
        ids = [own.detach() for own in looked_up.each_ids()]
        watched = _Watched(ids=ids, norms=[None] * len(ids))
        (route,) = self._route
        route.watched.append(watched)
        return watched


def _lengths(gradients: Tensor) -> Tensor:
    return gradients.detach().float().norm(dim=1)


def _of_key(watched: Sequence[_Watched], key: int) -> tuple[Tensor, Tensor]:
    """The ids of a key and the lengths of their gradients, over several passes."""
    found = [(each.ids[key], each.norms[key]) for each in watched]
    ids = [own for own, norms in found if norms is not None]
    lengths = [norms for _, norms in found if norms is not None]
    if not lengths:
        return torch.empty(0, dtype=torch.int64), torch.empty(0)
    return torch.cat(ids), torch.cat(lengths)


def _over_ranks(
    parts: Sequence[tuple[Tensor, Tensor]], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """What all ranks have of each key, rank after rank; the same on all of them."""
    on = device if dist.get_backend() == "nccl" else torch.device("cpu")
    own = torch.tensor([len(ids) for ids, _ in parts], device=on)
    ranks = dist.get_world_size()
    gathered = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(gathered, own)
    counts = torch.stack(gathered).tolist()  # the host waits here for the sizes of what comes
    most = max(sum(each) for each in counts)
    sent = torch.zeros(2, most, dtype=torch.int64, device=on)
    if len(parts) and (total := sum(counts[dist.get_rank()])):
        sent[0, :total] = torch.cat([ids.to(on) for ids, _ in parts])
        sent[1, :total] = torch.cat([norms.to(on) for _, norms in parts]).double().view(torch.int64)
    came = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(came, sent)
    by_rank = [
        list(zip(ids[: sum(each)].split(each), norms[: sum(each)].split(each)))
        for (ids, norms), each in zip(came, counts)
    ]
    return [
        (
            torch.cat([each[key][0] for each in by_rank]).to(device),
            torch.cat([each[key][1] for each in by_rank]).view(torch.float64).float().to(device),
        )
        for key in range(len(parts))
    ]
