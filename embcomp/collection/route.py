"""One route for all methods of a collection.

TorchRec's train pipeline traces a collection's `forward` and treats this module as a leaf, as it does
`embcomp.collection.combine`, so everything that looks at keys happens inside them. They hold no
buffers (`embcomp.layers.constant_tensors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from embcomp.collection.batch_shapes import (
    compacted,
    expanded,
    filled_up,
    one_bag_a_key,
    one_empty_row,
    picked,
    shared_by,
)
from embcomp.collection.groups import Group
from embcomp.collection.held_rows import HeldRows, RowsHolder
from embcomp.collection.scripted import (
    ScriptedPooledRoute,
    ScriptedUnpooledRoute,
    plain_lookups,
)
from embcomp.collection.table_identity import marks
from embcomp.layers.held_pieces import WritesRows
from embcomp.layers.host_values import known_equal, on_device
from embcomp.layers.routing import padded
from embcomp.layers.traced_leaves import leaf_call


class CompositeRoute(nn.Module):
    """Picks each method's features by name, routes them, and lays out the physical look-ups.

    Attributes:
        holder: what holds the rows of look-ups in bags of one; the collection keeps it true.

    Args:
        groups: the methods, in order.
        is_weighted: whether ids carry weights.
        unpooled: whether the collection hands out single ids' embeddings.
    """

    def __init__(
        self, groups: Sequence[Group], *, is_weighted: bool, unpooled: bool = False
    ) -> None:
        super().__init__()
        self.routes = nn.ModuleDict({group.label: group.backend.route for group in groups})
        self._groups = list(groups)
        self._tables = [table.name for group in groups for table in group.tables]
        self._sizes = [len(group.instances) for group in groups]
        self._unpooled = [group.unpooled for group in groups]
        self._ids_per_value = [group.backend.ids_per_value for group in groups]
        self._sees_every_row = any(group.backend.sees_every_row for group in groups)
        self._skips = [group.backend.skips_negative_ids for group in groups]
        self._features = [i.feature for group in groups for i in group.instances]
        self._is_weighted, self._is_unpooled = is_weighted, unpooled
        self._orders: dict[tuple[str, ...], list[int] | None] = {}
        self.holder = RowsHolder()

    @property
    def writes_rows(self) -> bool:
        """Whether a method writes to rows between steps."""
        return any(isinstance(route, WritesRows) for route in self.routes.values())

    def write_rows(self, rows: nn.Module) -> None:
        """Let methods write what the last step asks for; all ranks call it.

        Args:
            rows: what holds the rows of look-ups in bags of one.
        """
        for route in self.routes.values():
            if isinstance(route, WritesRows):
                route.write_rows(rows)

    def _may_write(self, rows: nn.Module) -> bool:
        """Whether this look-up is one before which methods write: every rank that shares rows makes it.

        Of rows that nobody shares, an evaluation sees what the last step left too.
        """
        if self.training and torch.is_grad_enabled():
            return True
        writes_anywhere = isinstance(rows, EmbeddingBagCollection)
        return writes_anywhere and not (
            torch.compiler.is_compiling() or torch.compiler.is_exporting()
        )

    def forward(
        self, features: KeyedJaggedTensor
    ) -> tuple[KeyedJaggedTensor | None, KeyedJaggedTensor | None, KeyedJaggedTensor]:
        """Route a batch.

        Args:
            features: bags of ids, keys in any order and more of them than needed.

        Returns:
            Look-ups whose bags are pooled by TorchRec, look-ups in bags of one (either None when
            no method wants it), and the features themselves, one key per (table, feature). Bags that rows
            share are looked up once, and the features' `inverse_indices` say, (keys, B), which of its key's
            each row has. Look-ups in bags of one have a stride for each key where what holds the rows takes
            that and keys differ in length; else keys are padded by empty bags to one stride.
        """
        traced = leaf_call(self, features)
        if traced is not None:
            return traced
        by_key = self.holder.take_by_key()
        if not self._tables:
            return None, None, features
        if self.holder.rows is not None and self._may_write(self.holder.rows):
            self.write_rows(self.holder.rows)
        features, shared = self._select(features)
        bags = self._as_bags(features)
        parts = bags.split(self._sizes) if len(self._sizes) > 1 else [bags]
        pooled: list[KeyedJaggedTensor] = []
        unpooled: list[tuple[KeyedJaggedTensor, int]] = []
        for i, route in enumerate(self.routes.values()):
            if self._unpooled[i]:
                unpooled.append((route(_without_weights(parts[i])), self._ids_per_value[i]))
            elif self._skips[i] and not self.holder.held.reads_negative_ids:
                pooled.append(_without_skipped(route(parts[i])))
            else:
                pooled.append(route(parts[i]))
        skips = any(skips and one for skips, one in zip(self._skips, self._unpooled))
        rows = _bags_of_one(
            unpooled,
            self.holder.held,
            by_key=by_key,
            is_weighted=self._is_weighted,
            skips=skips and not self.holder.held.reads_negative_ids,
        )
        if shared is not None:
            features = shared_by(features, shared)
        return _concatenated(pooled) if pooled else None, rows, features

    def __prepare_scriptable__(self) -> nn.Module:
        """What TorchScript compiles in this module's place."""
        kind = ScriptedUnpooledRoute if self._is_unpooled else ScriptedPooledRoute
        return kind(plain_lookups(self._groups), is_weighted=self._is_weighted)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, mark in marks(self._tables).items():
            destination[prefix + name] = mark
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wanted = {prefix + name for name in marks(self._tables)}
        others = {key: value for key, value in state_dict.items() if key not in wanted}
        if strict:
            missing_keys += sorted(wanted - set(state_dict))
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _select(self, features: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, Tensor | None]:
        """The features that the tables want, in their order; never more, never fewer.

        With which bag each row has, (keys, B), where rows share them.
        """
        features = maybe_td_to_kjt(features, None)
        own_bags = features.variable_stride_per_key()
        rows: Tensor | None = None
        if not self._is_unpooled and (own_bags or features.inverse_indices_or_none() is not None):
            (features, rows), own_bags = self._rectangle(features), False
        if self._is_weighted and features.weights_or_none() is None:
            raise ValueError("the collection is weighted, but the features carry no weights")
        keys = tuple(features.keys())
        if keys not in self._orders:
            self._orders[keys] = self._order(keys)
        order = self._orders[keys]
        if own_bags:
            return picked(features, list(range(len(keys))) if order is None else order), None
        if not self._is_weighted:
            features = _without_weights(features)
        if order is None:
            return features, rows
        rows = None if rows is None else rows[order]
        ordered = features.permute(order) if features.stride() else _without_rows(features, order)
        return ordered, rows

    def _rectangle(self, features: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, Tensor | None]:
        """As many bags for each feature, and which of them each row has where rows share them."""
        if self._sees_every_row and self.training:
            return expanded(features), None
        features, rows = compacted(features)
        if rows is not None and self.holder.equal_bags:
            # Ranks have different numbers of bags, but batches of one size.
            features = filled_up(features, rows.shape[1])
        return features, rows

    def _as_bags(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features as routes take them: as many bags for each, and at least one."""
        if self._is_unpooled and features.variable_stride_per_key():
            return one_bag_a_key(features)
        return features if features.stride() else one_empty_row(features)

    def _order(self, keys: tuple[str, ...]) -> list[int] | None:
        missing = [feature for feature in self._features if feature not in keys]
        if missing:
            raise ValueError(
                f"expected features {', '.join(dict.fromkeys(missing))}, which the batch lacks; "
                f"it has {', '.join(keys)}"
            )
        order = [keys.index(feature) for feature in self._features]
        return None if order == list(range(len(keys))) else order


def _without_rows(features: KeyedJaggedTensor, order: list[int]) -> KeyedJaggedTensor:
    """A batch of no rows with other keys."""
    return KeyedJaggedTensor(
        keys=[features.keys()[n] for n in order],
        values=features.values(),
        weights=features.weights_or_none(),
        lengths=features.lengths(),
        stride=0,
    )


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
    if (
        part.values().is_meta
    ):  # where nothing says which are negative, and bags are all that matters
        return part
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
    parts: list[tuple[KeyedJaggedTensor, int]],
    held: HeldRows,
    *,
    by_key: bool,
    is_weighted: bool,
    skips: bool,
) -> KeyedJaggedTensor | None:
    """Give each value a bag of its own.

    An EmbeddingBagCollection over such bags hands out rows one by one, and trains many times
    faster on CPU than an EmbeddingCollection does.

    Args:
        parts: look-ups, and how many physical ids stand for one value in them.
        held: what holds the rows.
        by_key: whether they are read key by key, so that no key is padded to another's length.
        is_weighted: whether the bags must carry weights (ones: the true ones come later).
        skips: whether bags of negative ids are to be empty.
    """
    if not parts:
        return None
    if held.reads_negative_ids and len({ids for _, ids in parts}) == 1:
        return _padded_by_ids([part for part, _ in parts], parts[0][1], is_weighted=is_weighted)
    physical = [count for part, _ in parts for count in part.length_per_key()]
    sizes = [ids for part, ids in parts for _ in part.keys()]
    counts = [count // ids for count, ids in zip(physical, sizes)]
    values = [part.values().to(torch.int64) for part, _ in parts]
    device = values[0].device
    differ = by_key and len(set(counts)) > 1
    # TorchRec has no batch of no rows.
    strides = counts if differ else [held.common_stride(max(1, *counts), device)] * len(counts)
    lengths = _lengths(counts, strides, sizes, device)
    joined = values[0] if len(values) == 1 else torch.cat(values)
    known: list[int] | None = physical
    if skips and not joined.is_meta:
        lengths[lengths > 0] = torch.cat(
            [_not_skipped(ids, size) for ids, (_, size) in zip(values, parts)]
        )
        joined = joined[joined >= 0]
        known = [int(own.sum()) for own in lengths.split(strides)] if differ else None
    # What the host knows already goes along: TorchRec would look for it in tensors.
    return KeyedJaggedTensor(
        keys=[key for part, _ in parts for key in part.keys()],
        values=joined,
        weights=torch.ones_like(joined, dtype=torch.float32) if is_weighted else None,
        lengths=lengths,
        length_per_key=known,
        stride=max(strides) if differ else strides[0],
        stride_per_key=counts if differ else None,
        stride_per_key_per_rank=[[n] for n in counts] if differ else None,
    )


def _padded_by_ids(
    parts: list[KeyedJaggedTensor], size: int, *, is_weighted: bool
) -> KeyedJaggedTensor:
    """`_bags_of_one` where a look-up too many costs less than bags of different lengths.

    Args:
        parts: look-ups.
        size: how many ids stand for one value.
        is_weighted: whether the bags must carry weights.
    """
    counts = [count for part in parts for count in part.length_per_key()]
    values = [part.values().to(torch.int64) for part in parts]
    joined, most = values[0] if len(values) == 1 else torch.cat(values), max(counts)
    if most:
        joined = padded(joined, counts, most).view(-1)
    else:
        joined, most = joined.new_zeros(len(counts) * size), size
    return KeyedJaggedTensor(
        keys=[key for part in parts for key in part.keys()],
        values=joined,
        weights=torch.ones_like(joined, dtype=torch.float32) if is_weighted else None,
        offsets=torch.arange(0, len(joined) + 1, size, device=joined.device),
        length_per_key=[most] * len(counts),
        stride=most // size,
    )


def _not_skipped(ids: Tensor, size: int) -> Tensor:
    """How many of the ids that stand for a value are looked up: (values,) int32."""
    looked_up = ids >= 0
    return looked_up.view(-1, size).sum(1, dtype=torch.int32) if size > 1 else looked_up.int()


def _lengths(
    counts: list[int], strides: list[int], sizes: list[int], device: torch.device
) -> Tensor:
    """The bags' lengths, key after key: (sum of strides,) int32.

    Args:
        counts: how many values each key has.
        strides: how many bags each key has, those beyond its values empty: `counts` itself, or
            equally many.
        sizes: how many ids stand for a value of each key.
        device: of the result.
    """
    full = strides is counts or known_equal(counts, strides[0])
    if full and len(set(sizes)) == 1:
        return torch.full((sum(strides),), sizes[0], dtype=torch.int32, device=device)
    each = on_device(sizes, device).to(torch.int32)
    if full:
        return each.repeat_interleave(on_device(counts, device), output_size=sum(counts))
    filled = torch.arange(strides[0], device=device) < on_device(counts, device)[:, None]
    return (filled * each[:, None]).view(-1)
