"""One combine for all methods of a collection: from looked-up rows to embeddings.

Like `embcomp.collection.route` it is a leaf for TorchRec's train pipeline, and holds no buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.distributed.types import LazyAwaitable
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from typing_extensions import override

from embcomp.collection.batch_shapes import handed_out, one_bag_a_key, one_empty_row
from embcomp.collection.compiled_rows import KeyRead, ReadBags, RowReads, are_readable
from embcomp.collection.each_pair import EachPair, key_widths
from embcomp.collection.groups import Group, TableFeature
from embcomp.collection.scripted import ScriptedPooled, ScriptedUnpooled, plain_lookups
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.host_values import known_equal, on_device, reads_wait
from embcomp.layers.lookup_context import LookupContext
from embcomp.layers.routing import key_offsets, plus_per_key
from embcomp.layers.rows_by_key import RowsByKey, split_padded
from embcomp.layers.traced_leaves import leaf_call


class ColumnPick:
    """Runs of columns in another order, copied run by run, forward and backward.

    Args:
        runs: first column and width of each, in the order wanted; none empty.
        total: columns that come.
    """

    def __init__(self, runs: Sequence[tuple[int, int]], total: int) -> None:
        edges = sorted({0, total, *chain.from_iterable((a, a + width) for a, width in runs)})
        self._sizes = [end - start for start, end in pairwise(edges)]
        pieces = {start: n for n, start in enumerate(edges)}
        self._order = [piece for a, width in runs for piece in range(pieces[a], pieces[a + width])]

    @classmethod
    def of(cls, wanted: Sequence[tuple[int, int]], total: int) -> ColumnPick | None:
        """The columns of these blocks, (first, width) each; None where they are all in place."""
        runs: list[tuple[int, int]] = []
        for first, width in wanted:
            if runs and sum(runs[-1]) == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + width)
            elif width:
                runs.append((first, width))
        return None if runs == [(0, total)] or not total else cls(runs, total)

    def __call__(self, values: Tensor) -> Tensor:
        """(R, columns that come) -> (R, columns that are wanted)."""
        if not self._order:
            return values[:, :0]
        parts = values.split(self._sizes, dim=1)
        return torch.cat([parts[piece] for piece in self._order], dim=1)


class LookupSplitter(nn.Module):
    """Picks physical look-ups by key out of what TorchRec returns, padding cut off.

    A sharded collection orders its output by sharding type and rank, so position means nothing.

    Args:
        groups: the methods whose look-ups one inner collection holds.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__()
        self._widths = [group.width for group in groups]
        self._wanted = [(key, dim) for group in groups for key, dim in key_widths(group.backend)]
        self._picks: dict[tuple[tuple[str, ...], tuple[int, ...]], ColumnPick | None] = {}
        self.detach = False

    def forward(self, rows: KeyedTensor) -> list[Tensor]:
        """Split `(B, all physical columns)` into one `(B, width)` tensor per method."""
        # What holds the rows may change, and with it whether they come padded.
        columns = tuple(rows.keys()), tuple(rows.length_per_key())
        if columns not in self._picks:
            self._picks[columns] = self._pick(*columns)
        pick = self._picks[columns]
        # Fused kernels update rows in every backward pass, unless no gradient reaches them.
        values = rows.values().detach() if self.detach else rows.values()
        if pick is not None:
            values = pick(values)
        return list(values.split(self._widths, dim=1)) if len(self._widths) > 1 else [values]

    def _pick(self, keys: tuple[str, ...], dims: tuple[int, ...]) -> ColumnPick | None:
        starts = dict(zip(keys, [sum(dims[:i]) for i in range(len(dims))]))
        return ColumnPick.of([(starts[key], dim) for key, dim in self._wanted], sum(dims))

    def by_key(self, rows: KeyedTensor | RowsByKey, counts: Mapping[str, int]) -> RowsByKey:
        """The rows of each key by themselves.

        Args:
            rows: as looked up, padded or not.
            counts: for each key, how many values it has.
        """
        if not isinstance(rows, RowsByKey):
            dims = rows.length_per_key()
            starts = dict(zip(rows.keys(), [sum(dims[:i]) for i in range(len(dims))]))
            places = [(counts[key], starts[key], dim) for key, dim in self._wanted]
            parts = split_padded(rows.values(), places)
            rows = RowsByKey({(key,): part for (key, _), part in zip(self._wanted, parts)})
        return rows.detached() if self.detach else rows


class Combine(nn.Module):
    """Turns looked-up rows into each (table, feature)'s embeddings.

    Args:
        groups: the methods, in the order in which `CompositeRoute` has them.
        instances: all (table, feature) pairs in the order declared: the order of the output.
    """

    def __init__(self, groups: Sequence[Group], instances: Sequence[TableFeature]) -> None:
        super().__init__()
        self.combines = nn.ModuleDict({group.label: group.backend.combine for group in groups})
        self.pooled = LookupSplitter([group for group in groups if not group.unpooled])
        self.unpooled = LookupSplitter([group for group in groups if group.unpooled])
        self._built = list(groups)
        self._groups = [(list(group.instances), group.unpooled) for group in groups]
        self._each = [EachPair(group) for group in groups]
        self._needs_context = [group.backend.needs_context for group in groups]
        self._instances = list(instances)
        self._came = [instance for group in groups for instance in group.instances]
        self.pads = False
        """Whether keys of different lengths are combined and summed at once, padded to one length: what
        that adds to the work costs less than an operation for each key."""

    def __prepare_scriptable__(self) -> nn.Module:
        """What TorchScript compiles in this module's place."""
        raise NotImplementedError

    @property
    def joined(self) -> list[tuple[str, ...]]:
        """Look-ups in bags of one whose rows methods want side by side, where keys differ in length."""
        return [keys for each in self._each for keys in each.joined]

    def detach_rows(self, detached: bool) -> None:
        """Keep gradients from the rows, or let them through again."""
        self.pooled.detach = self.unpooled.detach = detached

    def _rows(
        self,
        pooled: KeyedTensor | None,
        unpooled: KeyedTensor | RowsByKey | None,
        features: KeyedJaggedTensor,
    ) -> list[tuple[list[TableFeature], bool, Tensor | list[Tensor]]]:
        """Each method's instances, whether they are unpooled, and its combined rows.

        Combined rows are one tensor, columns side by side, or one for each instance where these
        have numbers of values of their own. What a sharded collection returns is awaited by the
        first attribute read, so no isinstance.
        """
        sharded = isinstance(pooled, LazyAwaitable) or isinstance(unpooled, LazyAwaitable)
        rectangle = unpooled is None or self._is_rectangle(unpooled, features)
        parts = iter(self.pooled(pooled) if pooled is not None else [])
        rows = iter(self.unpooled(unpooled) if unpooled is not None and rectangle else [])
        by_key = None if rectangle else self.unpooled.by_key(unpooled, self._counts(features))
        counts = features.length_per_key()
        found: list[tuple[list[TableFeature], bool, Tensor | list[Tensor]]] = []
        start = 0
        for (instances, is_unpooled), needs_context, combine, each in zip(
            self._groups, self._needs_context, self.combines.values(), self._each
        ):
            own = slice(start, start + len(instances))
            combined: Tensor | list[Tensor]
            if is_unpooled and by_key is not None:
                context = LookupContext(features, own, max(counts[own]), sharded)
                combined = each.combine(combine, by_key, context)
            else:
                part = next(rows if is_unpooled else parts)
                if needs_context:
                    combined = combine(part, LookupContext(features, own, len(part), sharded))
                else:
                    combined = combine(part)
            found.append((instances, is_unpooled, combined))
            start += len(instances)
        return found

    def _is_rectangle(self, unpooled: KeyedTensor | RowsByKey, features: KeyedJaggedTensor) -> bool:
        """Whether the look-ups in bags of one are combined side by side, keys padded or of one length."""
        if isinstance(unpooled, RowsByKey):
            return False
        if self.pads or torch.compiler.is_compiling():
            return True  # numbers of values may be unknown, and keys were padded
        unpooled_ones = [own for instances, own in self._groups for _ in instances]
        own = [n for n, one in zip(features.length_per_key(), unpooled_ones) if one]
        return known_equal(own, len(unpooled.values()))

    def _counts(self, features: KeyedJaggedTensor) -> dict[str, int]:
        """How many values each physical look-up in bags of one has."""
        counts: dict[str, int] = {}
        start, lengths = 0, features.length_per_key()
        for (instances, is_unpooled), each in zip(self._groups, self._each):
            if is_unpooled:
                counts |= {key: lengths[start + n] for key, n in zip(each.keys, each.pairs)}
            start += len(instances)
        return counts


class PooledCombine(Combine):
    """Ends in one pooled embedding per (table, feature): a KeyedTensor, as declared."""

    def __init__(self, groups: Sequence[Group], instances: Sequence[TableFeature]) -> None:
        super().__init__(groups, instances)
        self._keys = [instance.key for instance in instances]
        self._dims = [instance.table.embedding_dim for instance in instances]
        self._came_dims = [instance.table.embedding_dim for instance in self._came]
        self._pick = _pick_of(self._came, instances)
        means = [i.table.mean_pooling for i in self._came]
        self._means = Constant(means) if any(means) else None
        self._owner = Constant(
            [n for n, i in enumerate(self._came) for _ in range(i.table.embedding_dim)]
        )

    @override
    def forward(
        self,
        pooled: KeyedTensor | None,
        unpooled: KeyedTensor | RowsByKey | None,
        features: KeyedJaggedTensor,
    ) -> KeyedTensor:
        traced = leaf_call(self, pooled, unpooled, features)
        if traced is not None:
            return traced
        if not self._keys:
            nothing = features.lengths().new_zeros(features.stride(), 0, dtype=torch.float32)
            return KeyedTensor(keys=[], length_per_key=[], values=nothing)
        bags = features if features.stride() else one_empty_row(features)
        parts: list[Tensor] = []
        start = 0
        for instances, is_unpooled, rows in self._rows(pooled, unpooled, bags):
            if is_unpooled and self.pads and isinstance(rows, Tensor):
                rows = sum_padded(rows, instances, bags, start)
            elif is_unpooled:
                rows = sum_bags(rows, instances, bags, start)
            assert isinstance(rows, Tensor)
            parts.append(rows)
            start += len(instances)
        values = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if self._means is not None:
            values = values * self._bag_scales(bags)
        if (shared := features.inverse_indices_or_none()) is not None:
            values = handed_out(values, self._came_dims, shared[1])
        if self._pick is not None:
            values = self._pick(values)
        if bags is not features:
            values = values[:0]
        return KeyedTensor(keys=self._keys, length_per_key=self._dims, values=values)

    @override
    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptedPooled(plain_lookups(self._built), self._instances)

    def _bag_scales(self, features: KeyedJaggedTensor) -> Tensor:
        """One over the bag's length for averaged columns, one for summed ones: (B, columns)."""
        assert self._means is not None
        lengths = features.lengths().view(len(self._came), -1)  # (instances, B)
        averaged = self._means.on(lengths.device).bool().unsqueeze(1)
        scales = torch.where(averaged, lengths.clamp(min=1), 1).reciprocal()
        return scales.t().index_select(1, self._owner.on(lengths.device))


def _pick_of(came: Sequence[TableFeature], wanted: Sequence[TableFeature]) -> ColumnPick | None:
    """Where the wanted columns are among those that came; None when they are in place."""
    starts: dict[tuple[str, str], int] = {}
    start = 0
    for instance in came:
        starts[instance.pair] = start
        start += instance.table.embedding_dim
    return ColumnPick.of([(starts[i.pair], i.table.embedding_dim) for i in wanted], start)


def sum_bags(
    rows: Tensor | Sequence[Tensor],
    instances: Sequence[TableFeature],
    features: KeyedJaggedTensor,
    start: int,
) -> Tensor:
    """Pool combined rows into the bags that they came from.

    Args:
        rows: (values, sum of dims), value `v` of an instance in row `v` of its columns; or for each
            instance (its values, dim).
        instances: the method's (table, feature) pairs.
        features: the batch's bags, and their weights if any.
        start: position of the first of the instances among the keys of `features`.

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
    if isinstance(rows, Tensor):
        if reads_wait(rows.device):
            if known_equal(counts[own], len(rows)):
                values = (
                    None
                    if weights is None
                    else weights[offsets[start] : offsets[own.stop]].to(rows.dtype)
                )
                return _sum_rectangle(rows, dims, lengths[own], values)
        elif (
            weights is None and known_equal(counts[own], batch) and bool((lengths[own] == 1).all())
        ):
            return rows[:batch]  # one value a bag: already in place
    compiled = _sum_by_compiled_code(rows, dims, features, start)
    if compiled is not None:
        return compiled
    if isinstance(rows, Tensor):
        rows = rows.split(dims, dim=1)
    pooled = []
    for n, part in enumerate(rows, start):
        values = part[: counts[n]]
        if weights is not None:
            values = values * weights[offsets[n] : offsets[n + 1]].to(part.dtype).unsqueeze(1)
        bags = torch.arange(batch, device=part.device).repeat_interleave(
            lengths[n], output_size=counts[n]
        )
        pooled.append(part.new_zeros(batch, part.shape[1]).index_add(0, bags, values))
    return torch.cat(pooled, dim=1)


def _sum_by_compiled_code(
    rows: Tensor | Sequence[Tensor], dims: Sequence[int], features: KeyedJaggedTensor, start: int
) -> Tensor | None:
    """`sum_bags` in one call; None where compiled code cannot read the rows."""
    tables = [rows] if isinstance(rows, Tensor) else list(rows)
    weights = features.weights_or_none()
    if not are_readable(tables, features.lengths_or_none(), weights):
        return None
    batch, own = features.stride(), slice(start, start + len(dims))
    ends = features.offset_per_key()
    counts = features.length_per_key()[own]
    bags = ReadBags(
        counts=counts,
        bags=[batch] * len(dims),
        offsets=features.offsets()[own.start * batch : own.stop * batch + 1].to(torch.int64),
        weights=None if weights is None else weights[ends[own.start] : ends[own.stop]].float(),
    )
    reads = _reads_of_values(tuple(dims), side_by_side=isinstance(rows, Tensor))
    return reads.sums(tables, bags)[0]


@lru_cache
def _reads_of_values(dims: tuple[int, ...], *, side_by_side: bool) -> RowReads:
    """Sums of the values of (table, feature) pairs, whose rows are columns of one tensor or of each its own."""
    firsts = [0, *accumulate(dims)]
    keys = [
        KeyRead(
            table=0 if side_by_side else n,
            first=first if side_by_side else 0,
            width=dim,
            into=first,
        )
        for n, (dim, first) in enumerate(zip(dims, firsts))
    ]
    return RowReads(keys, [firsts[-1]])


def _sum_rectangle(
    rows: Tensor, dims: Sequence[int], lengths: Tensor, weights: Tensor | None
) -> Tensor:
    """`sum_bags` of as many values for each of P instances, at once and without looking at lengths.

    Args:
        rows: (N, sum of dims).
        dims: width of each instance's embedding.
        lengths: (P, B) of the bags.
        weights: (P * N,) of the values.
    """
    count, (instances, batch) = len(rows), lengths.shape
    pairs = torch.arange(instances, device=rows.device)
    owner = pairs.repeat_interleave(on_device(dims, rows.device), output_size=rows.shape[1])
    bags = torch.arange(batch, device=rows.device).repeat(instances)
    bags = bags.repeat_interleave(lengths.reshape(-1), output_size=instances * count)
    if weights is not None:
        rows = rows * weights.view(instances, count).t().index_select(1, owner)
    bags = bags.view(instances, count).t().index_select(1, owner)  # (N, sum of dims)
    return rows.new_zeros(batch, rows.shape[1]).scatter_add(0, bags, rows)


def sum_padded(
    rows: Tensor, instances: Sequence[TableFeature], features: KeyedJaggedTensor, start: int
) -> Tensor:
    """`sum_bags` of rows that are padded to one length, in as many operations for any instances.

    Columns are summed in pieces of the width that divides all embeddings', each a row by itself.
    """
    dims = [instance.table.embedding_dim for instance in instances]
    width = gcd(*dims)
    own = [start + n for n, dim in enumerate(dims) for _ in range(dim // width)]
    counts, batch, pieces = features.length_per_key(), features.stride(), len(own)
    in_place = own == list(range(len(counts)))
    if not in_place:
        features = features.permute(own)
    ends = key_offsets(features)
    weights = features.weights_or_none()
    firsts = on_device([n - pieces * end for n, end in enumerate(ends[:-1])], rows.device)
    places = torch.arange(0, pieces * ends[-1], pieces, device=rows.device)
    summed = F.embedding_bag(
        plus_per_key(places, firsts, features),
        rows.reshape(-1, width),
        features.offsets().to(torch.int64),
        mode="sum",
        per_sample_weights=None if weights is None else weights.to(rows.dtype),
        include_last_offset=True,
    )
    return summed.view(pieces, batch, width).transpose(0, 1).reshape(batch, -1)


def _own_bags(features: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, Sequence[Tensor]]:
    """A batch as routes took it, and the lengths of the bags that each key really has."""
    if features.variable_stride_per_key():
        return one_bag_a_key(features), features.lengths().split(features.stride_per_key())
    if not features.stride():
        return one_empty_row(features), [features.lengths()] * len(features.keys())
    return features, features.lengths().view(-1, features.stride()).unbind()


class UnpooledCombine(Combine):
    """Ends in one embedding per id: a dict of JaggedTensors.

    Args:
        groups: the methods; all of them unpooled.
        instances: all (table, feature) pairs in the order declared.
        need_indices: whether the ids go along, as the JaggedTensors' weights.
    """

    def __init__(
        self, groups: Sequence[Group], instances: Sequence[TableFeature], *, need_indices: bool
    ) -> None:
        super().__init__(groups, instances)
        self._need_indices = need_indices

    @override
    def forward(
        self,
        pooled: KeyedTensor | None,
        unpooled: KeyedTensor | RowsByKey | None,
        features: KeyedJaggedTensor,
    ) -> dict[str, JaggedTensor]:
        traced = leaf_call(self, pooled, unpooled, features)
        if traced is not None:
            return traced
        bags, lengths = _own_bags(features)
        counts = bags.length_per_key()
        offsets = bags.offset_per_key()
        found: dict[tuple[str, str], JaggedTensor] = {}
        n = 0
        for instances, _, rows in self._rows(pooled, unpooled, bags):
            dims = [instance.table.embedding_dim for instance in instances]
            parts = rows.split(dims, dim=1) if isinstance(rows, Tensor) else rows
            for instance, part in zip(instances, parts):
                ids = features.values()[offsets[n] : offsets[n + 1]]
                found[instance.pair] = JaggedTensor(
                    values=part[: counts[n]],
                    lengths=lengths[n],
                    weights=ids if self._need_indices else None,
                )
                n += 1
        return {instance.key: found[instance.pair] for instance in self._instances}

    @override
    def __prepare_scriptable__(self) -> nn.Module:
        lookups = plain_lookups(self._built)
        return ScriptedUnpooled(lookups, self._instances, need_indices=self._need_indices)
