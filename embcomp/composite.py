"""One route and one combine for all methods of a collection.

TorchRec's train pipeline traces a collection's ``forward`` and treats these two modules as leaves,
so everything that looks at keys happens inside them. They hold no buffers (``embcomp.constants``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.types import LazyAwaitable
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embcomp.backend import Backend, BackendConfig
from embcomp.constants import Constant
from embcomp.routing import key_offsets
from embcomp.tables import PhysicalTable, TableSpec


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One feature of one table: what comes out of a collection under one key."""

    feature: str
    table: TableSpec
    key: str


def instances_of(tables: Sequence[TableSpec]) -> list[Instance]:
    """The (table, feature) pairs in order, keyed as TorchRec keys them.

    The key is the feature, or ``feature@table`` when the feature is in several tables.
    """
    features = [feature for table in tables for feature in table.feature_names]
    return [
        Instance(
            feature=feature,
            table=table,
            key=feature if features.count(feature) == 1 else f"{feature}@{table.name}",
        )
        for table in tables
        for feature in table.feature_names
    ]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A method as built for its tables, and whether it needs its rows unpooled."""

    config: BackendConfig
    tables: Sequence[TableSpec]
    backend: Backend
    instances: Sequence[Instance]
    unpooled: bool

    @property
    def width(self) -> int:
        """Columns of the rows that ``combine`` takes."""
        dims = {key: t.embedding_dim for t in self.backend.physical_tables for key in t.keys}
        return sum(dims[key] for key in self.backend.keys)


class CompositeRoute(nn.Module):
    """Picks each method's features by name, routes them, and lays out the physical look-ups.

    Args:
        groups: the methods, in order.
        is_weighted: whether ids carry weights.
    """

    def __init__(self, groups: Sequence[Group], *, is_weighted: bool) -> None:
        super().__init__()
        self.routes = nn.ModuleList(group.backend.route for group in groups)
        self._sizes = [len(group.instances) for group in groups]
        self._unpooled = [group.unpooled for group in groups]
        self._ids_per_value = [group.backend.ids_per_value for group in groups]
        self._skips = [group.backend.skips for group in groups]
        self._features = [i.feature for group in groups for i in group.instances]
        self._is_weighted = is_weighted
        self._orders: dict[tuple[str, ...], list[int] | None] = {}

    def forward(
        self, features: KeyedJaggedTensor
    ) -> tuple[KeyedJaggedTensor | None, KeyedJaggedTensor | None, KeyedJaggedTensor]:
        """Route a batch.

        Args:
            features: bags of ids, keys in any order and more of them than needed.

        Returns:
            Look-ups whose bags are pooled by TorchRec, look-ups in bags of one (either None when
            no method wants it), and the features themselves, one key per (table, feature).
        """
        features = self._select(features)
        parts = features.split(self._sizes) if len(self._sizes) > 1 else [features]
        pooled: list[KeyedJaggedTensor] = []
        unpooled: list[tuple[KeyedJaggedTensor, int]] = []
        for i, route in enumerate(self.routes):
            if self._unpooled[i]:
                unpooled.append((route(_without_weights(parts[i])), self._ids_per_value[i]))
            elif self._skips[i]:
                pooled.append(_without_skipped(route(parts[i])))
            else:
                pooled.append(route(parts[i]))
        skips = any(skips and one for skips, one in zip(self._skips, self._unpooled))
        rows = _bags_of_one(unpooled, is_weighted=self._is_weighted, skips=skips)
        return _concatenated(pooled) if pooled else None, rows, features

    def _select(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features that the tables want, in their order; never more, never fewer."""
        if features.variable_stride_per_key():
            raise ValueError(
                "expected a KeyedJaggedTensor with one batch size for all keys, got a variable "
                "stride per key; deduplicated (VBE) batches must be expanded first"
            )
        if self._is_weighted and features.weights_or_none() is None:
            raise ValueError("the collection is weighted, but the features carry no weights")
        if not self._is_weighted:
            features = _without_weights(features)
        keys = tuple(features.keys())
        if keys not in self._orders:
            self._orders[keys] = self._order(keys)
        order = self._orders[keys]
        return features if order is None else features.permute(order)

    def _order(self, keys: tuple[str, ...]) -> list[int] | None:
        missing = [feature for feature in self._features if feature not in keys]
        if missing:
            raise ValueError(
                f"expected features {', '.join(dict.fromkeys(missing))}, which the batch lacks; "
                f"it has {', '.join(keys)}"
            )
        order = [keys.index(feature) for feature in self._features]
        return None if order == list(range(len(keys))) else order


def _without_weights(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    if features.weights_or_none() is None:
        return features
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=features.lengths(),
        offsets=features.offsets_or_none(),
        stride=features.stride(),
        length_per_key=features.length_per_key(),
    )


def _concatenated(parts: list[KeyedJaggedTensor]) -> KeyedJaggedTensor:
    return parts[0] if len(parts) == 1 else KeyedJaggedTensor.concat(parts)


def _without_skipped(part: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The look-ups less those with negative ids; bags grow shorter."""
    kept = part.values() >= 0
    weights = part.weights_or_none()
    ends = torch.zeros(kept.numel() + 1, dtype=torch.int64, device=kept.device)
    torch.cumsum(kept, 0, out=ends[1:])
    offsets = ends[part.offsets().long()]
    return KeyedJaggedTensor(
        keys=part.keys(),
        values=part.values()[kept],
        weights=None if weights is None else weights[kept],
        lengths=offsets.diff().to(torch.int32),
        offsets=offsets,
        stride=part.stride(),
    )


def _bags_of_one(
    parts: list[tuple[KeyedJaggedTensor, int]], *, is_weighted: bool, skips: bool
) -> KeyedJaggedTensor | None:
    """Give each value a bag of its own, the keys padded by empty bags to one stride.

    An EmbeddingBagCollection over such bags hands out rows one by one, and trains many times
    faster on CPU than an EmbeddingCollection does.

    Args:
        parts: look-ups, and how many physical ids stand for one value in them.
        is_weighted: whether the bags must carry weights (ones: the true ones come later).
        skips: whether bags of negative ids are to be empty.
    """
    if not parts:
        return None
    physical = [count for part, _ in parts for count in part.length_per_key()]
    sizes = [ids for part, ids in parts for _ in part.keys()]
    counts = [count // ids for count, ids in zip(physical, sizes)]
    values = [part.values().to(torch.int64) for part, _ in parts]
    device = values[0].device
    stride = _common_stride(max(1, *counts), device)  # TorchRec has no batch of no rows
    if counts == [stride] * len(counts) and len(set(sizes)) == 1:
        lengths = torch.full((stride * len(counts),), sizes[0], dtype=torch.int32, device=device)
    else:
        filled = torch.arange(stride, device=device) < torch.tensor(counts, device=device)[:, None]
        lengths = (filled * torch.tensor(sizes, device=device)[:, None]).to(torch.int32).view(-1)
    joined = values[0] if len(values) == 1 else torch.cat(values)
    if skips:
        firsts = [ids[::size] for ids, (_, size) in zip(values, parts)]
        lengths[lengths > 0] *= torch.cat(firsts) >= 0
        joined = joined[joined >= 0]
    return KeyedJaggedTensor(
        keys=[key for part, _ in parts for key in part.keys()],
        values=joined,
        weights=torch.ones_like(joined, dtype=torch.float32) if is_weighted else None,
        lengths=lengths,
        stride=stride,
        length_per_key=None if skips else physical,
    )


def _common_stride(stride: int, device: torch.device) -> int:
    """The largest stride over the ranks: row-wise sharded tables need the same on each of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return stride
    on = device if dist.get_backend() == "nccl" else torch.device("cpu")
    largest = torch.tensor(stride, device=on)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


class Rows(nn.Module):
    """Picks physical look-ups by key out of what TorchRec returns, padding cut off.

    A sharded collection orders its output by sharding type and rank, so position means nothing.

    Args:
        groups: the methods whose look-ups one inner collection holds.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__()
        self._widths = [group.width for group in groups]
        self._wanted = [
            (key, table.embedding_dim)
            for group in groups
            for key, table in _in_order(group.backend)
        ]
        self._columns: dict[tuple[str, ...], Constant | None] = {}
        self.detach = False

    def forward(self, rows: KeyedTensor) -> list[Tensor]:
        """Split ``(B, all physical columns)`` into one ``(B, width)`` tensor per method."""
        keys = tuple(rows.keys())
        if keys not in self._columns:
            self._columns[keys] = self._pick(keys, rows.length_per_key())
        columns = self._columns[keys]
        # Fused kernels update rows in every backward pass, unless no gradient reaches them.
        values = rows.values().detach() if self.detach else rows.values()
        if columns is not None:
            values = values.index_select(1, columns.on(values.device))
        return list(values.split(self._widths, dim=1)) if len(self._widths) > 1 else [values]

    def _pick(self, keys: tuple[str, ...], dims: list[int]) -> Constant | None:
        starts = dict(zip(keys, [sum(dims[:i]) for i in range(len(dims))]))
        picked = [starts[key] + column for key, dim in self._wanted for column in range(dim)]
        return None if picked == list(range(sum(dims))) else Constant(picked)


def _in_order(backend: Backend) -> list[tuple[str, PhysicalTable]]:
    owner = {key: table for table in backend.physical_tables for key in table.keys}
    return [(key, owner[key]) for key in backend.keys]


class Combine(nn.Module):
    """Turns looked-up rows into each (table, feature)'s embeddings.

    Args:
        groups: the methods, in the order in which ``CompositeRoute`` has them.
        instances: all (table, feature) pairs in the order declared: the order of the output.
    """

    def __init__(self, groups: Sequence[Group], instances: Sequence[Instance]) -> None:
        super().__init__()
        self.combines = nn.ModuleList(group.backend.combine for group in groups)
        self.pooled = Rows([group for group in groups if not group.unpooled])
        self.unpooled = Rows([group for group in groups if group.unpooled])
        self._groups = [(list(group.instances), group.unpooled) for group in groups]
        self._takes_ids = [group.backend.takes_ids for group in groups]
        self._instances = list(instances)
        self._came = [instance for group in groups for instance in group.instances]

    def detach_rows(self, detached: bool) -> None:
        """Keep gradients from the rows, or let them through again."""
        self.pooled.detach = self.unpooled.detach = detached

    def _rows(
        self,
        pooled: KeyedTensor | None,
        unpooled: KeyedTensor | None,
        features: KeyedJaggedTensor,
    ) -> list[tuple[list[Instance], bool, Tensor]]:
        """Each method's instances, whether they are unpooled, and its combined rows.

        What a sharded collection returns is awaited by the first attribute read, so no isinstance.
        """
        sharded = isinstance(pooled, LazyAwaitable) or isinstance(unpooled, LazyAwaitable)
        parts = iter(self.pooled(pooled) if pooled is not None else [])
        rows = iter(self.unpooled(unpooled) if unpooled is not None else [])
        found, start = [], 0
        for (instances, is_unpooled), takes_ids, combine in zip(
            self._groups, self._takes_ids, self.combines
        ):
            part = next(rows if is_unpooled else parts)
            if takes_ids:
                own = slice(start, start + len(instances))
                combined = combine(part, LookedUp(features, own, len(part), sharded))
            else:
                combined = combine(part)
            found.append((instances, is_unpooled, combined))
            start += len(instances)
        return found


@dataclass(frozen=True)
class LookedUp:
    """What the rows that a ``combine`` gets were looked up for.

    Args:
        features: the batch's bags, one key for each (table, feature) of all methods.
        own: the method's keys among them.
        rows: how many rows were looked up for each key; those beyond a key's values only pad.
        sharded: whether this is one rank's share of a step.
    """

    features: KeyedJaggedTensor
    own: slice
    rows: int
    sharded: bool = False

    def ids(self) -> Tensor:
        """The logical ids: (rows, number of keys) int64, 0 where a row only pads."""
        offsets, counts = key_offsets(self.features), self._counts()
        ids = self.features.values()[offsets[self.own.start] : offsets[self.own.stop]]
        return self._by_row(ids.to(torch.int64), counts)

    def samples(self) -> Tensor:
        """The rows of the batch that the ids belong to: (rows, number of keys) int64, in [0, B)."""
        batch = self.features.stride()
        lengths = self.features.lengths().view(-1, batch)[self.own]
        one = torch.arange(batch, device=lengths.device)
        counts = self._counts()
        each = one.repeat(len(counts))
        if counts != [batch] * len(counts) or not bool((lengths == 1).all()):
            each = each.repeat_interleave(lengths.reshape(-1).long(), output_size=sum(counts))
        return self._by_row(each, counts)

    def global_samples(self) -> Tensor:
        """The same, counted over the batches of all ranks in their order.

        What is drawn from these numbers does not depend on how many ranks share a step.
        """
        if not self.sharded:
            return self.samples()
        return self.samples() + dist.get_rank() * self.features.stride()

    def are_values(self) -> Tensor:
        """Which rows were looked up for a value and do not only pad: (rows, number of keys) bool."""
        counts = self._counts()
        row = torch.arange(self.rows, device=self.features.device())
        return row.unsqueeze(1) < torch.tensor(counts, device=row.device)

    def _counts(self) -> list[int]:
        return self.features.length_per_key()[self.own]

    def _by_row(self, values: Tensor, counts: list[int]) -> Tensor:
        if counts == [self.rows] * len(counts):
            return values.view(len(counts), self.rows).t()
        padded = values.new_zeros(len(counts), self.rows)
        for column, part in zip(padded, values.split(counts)):
            column[: len(part)] = part
        return padded.t()


class PooledCombine(Combine):
    """Ends in one pooled embedding per (table, feature): a KeyedTensor, as declared."""

    def __init__(self, groups: Sequence[Group], instances: Sequence[Instance]) -> None:
        super().__init__(groups, instances)
        self._keys = [instance.key for instance in instances]
        self._dims = [instance.table.embedding_dim for instance in instances]
        self._columns = _columns(self._came, instances)
        means = [i.table.mean_pooling for i in self._came]
        self._means = Constant(means) if any(means) else None
        self._owner = Constant(
            [n for n, i in enumerate(self._came) for _ in range(i.table.embedding_dim)]
        )

    def forward(
        self,
        pooled: KeyedTensor | None,
        unpooled: KeyedTensor | None,
        features: KeyedJaggedTensor,
    ) -> KeyedTensor:
        parts: list[Tensor] = []
        start = 0
        for instances, is_unpooled, rows in self._rows(pooled, unpooled, features):
            if is_unpooled:
                rows = sum_bags(rows, instances, features, start)
            parts.append(rows)
            start += len(instances)
        values = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if self._means is not None:
            values = values * self._bag_scales(features)
        if self._columns is not None:
            values = values.index_select(1, self._columns.on(values.device))
        return KeyedTensor(keys=self._keys, length_per_key=self._dims, values=values)

    def _bag_scales(self, features: KeyedJaggedTensor) -> Tensor:
        """One over the bag's length for averaged columns, one for summed ones: (B, columns)."""
        assert self._means is not None
        lengths = features.lengths().view(len(self._came), -1)  # (instances, B)
        averaged = self._means.on(lengths.device).bool().unsqueeze(1)
        scales = torch.where(averaged, lengths.clamp(min=1), 1).reciprocal()
        return scales.t().index_select(1, self._owner.on(lengths.device))


def _columns(came: Sequence[Instance], wanted: Sequence[Instance]) -> Constant | None:
    """Where the wanted columns are among those that came; None when they are in place."""
    starts: dict[str, int] = {}
    start = 0
    for instance in came:
        starts[instance.key] = start
        start += instance.table.embedding_dim
    picked = [
        starts[instance.key] + column
        for instance in wanted
        for column in range(instance.table.embedding_dim)
    ]
    return None if picked == list(range(start)) else Constant(picked)


def sum_bags(
    rows: Tensor, instances: Sequence[Instance], features: KeyedJaggedTensor, start: int
) -> Tensor:
    """Pool combined rows into the bags that they came from.

    Args:
        rows: (stride, sum of dims); value ``v`` of an instance in row ``v`` of its columns.
        instances: the method's (table, feature) pairs.
        features: the batch's bags, and their weights if any.
        start: position of the first of the instances among the keys of ``features``.

    Returns:
        (B, sum of dims), the weighted sums of the bags.
    """
    batch = features.stride()
    counts = features.length_per_key()
    offsets = features.offset_per_key()
    lengths = features.lengths().view(-1, batch)
    weights = features.weights_or_none()
    dims = [instance.table.embedding_dim for instance in instances]
    own = slice(start, start + len(dims))
    if weights is None and counts[own] == [batch] * len(dims) and bool((lengths[own] == 1).all()):
        return rows[:batch]  # one value a bag: already in place
    pooled = []
    for n, part in enumerate(rows.split(dims, dim=1), start):
        values = part[: counts[n]]
        if weights is not None:
            values = values * weights[offsets[n] : offsets[n + 1]].unsqueeze(1)
        bags = torch.arange(batch, device=rows.device).repeat_interleave(
            lengths[n], output_size=counts[n]
        )
        pooled.append(rows.new_zeros(batch, part.shape[1]).index_add(0, bags, values))
    return torch.cat(pooled, dim=1)


class UnpooledCombine(Combine):
    """Ends in one embedding per id: a dict of JaggedTensors.

    Args:
        groups: the methods; all of them unpooled.
        instances: all (table, feature) pairs in the order declared.
        need_indices: whether the ids go along, as the JaggedTensors' weights.
    """

    def __init__(
        self, groups: Sequence[Group], instances: Sequence[Instance], *, need_indices: bool
    ) -> None:
        super().__init__(groups, instances)
        self._need_indices = need_indices

    def forward(
        self,
        pooled: KeyedTensor | None,
        unpooled: KeyedTensor | None,
        features: KeyedJaggedTensor,
    ) -> dict[str, JaggedTensor]:
        batch = features.stride()
        counts = features.length_per_key()
        offsets = features.offset_per_key()
        lengths = features.lengths().view(-1, batch)
        found: dict[str, JaggedTensor] = {}
        n = 0
        for instances, _, rows in self._rows(pooled, unpooled, features):
            parts = rows.split([instance.table.embedding_dim for instance in instances], dim=1)
            for instance, part in zip(instances, parts):
                ids = features.values()[offsets[n] : offsets[n + 1]]
                found[instance.key] = JaggedTensor(
                    values=part[: counts[n]],
                    lengths=lengths[n],
                    weights=ids if self._need_indices else None,
                )
                n += 1
        return {instance.key: found[instance.key] for instance in self._instances}
