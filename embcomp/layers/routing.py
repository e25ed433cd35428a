"""What routes share: the shape of a batch of ids, and ids hashed for many look-ups at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.layers.constant_tensors import Constant
from embcomp.layers.fused_lookups import FusedRoutes, HashedRow
from embcomp.layers.hashing import hash_rows
from embcomp.layers.hashing_compiled import hash_each, is_hashable
from embcomp.layers.host_values import known_equal, on_device


def common_count(features: KeyedJaggedTensor) -> int | None:
    """The number of values that every key has, or None when they differ.

    Where it exists, the values are a rectangle `(keys, count)` and constants of the keys
    broadcast over it. This is so whenever every feature is single-valued.
    """
    counts = features.length_per_key()
    return counts[0] if counts and known_equal(counts[1:], counts[0]) else None


def key_offsets(features: KeyedJaggedTensor) -> list[int]:
    """Where each key's values begin, and where the last one's end; also in exported programs.

    TorchRec's `offset_per_key` calls an operator of FBGEMM there.
    """
    return [0, *accumulate(features.length_per_key())]


def per_value(constants: Tensor, features: KeyedJaggedTensor) -> Tensor:
    """One constant per key `(..., keys)` repeated for each of the key's values `(..., N)`."""
    count = common_count(features)
    if count is not None:  # what every exporter can say
        return constants.unsqueeze(-1).expand(*constants.shape, count).flatten(-2)
    if torch.compiler.is_compiling():
        counts = on_device(features.length_per_key(), constants.device)
        return constants.repeat_interleave(counts, -1, output_size=features.values().numel())
    return constants.index_select(-1, key_of_each(features))


class _LastKeys(threading.local):
    """What `key_of_each` found last."""

    counts: list[int] | None = None
    found: Tensor | None = None


_LAST = _LastKeys()


def key_of_each(features: KeyedJaggedTensor) -> Tensor:
    """The key of each value (N,), counted; kept while a batch goes from one module to the next."""
    counts, device = features.length_per_key(), features.device()
    found = _LAST.found
    if (
        found is None
        or _LAST.counts is not counts
        or found.device != device
        or found.is_inference() != torch.is_inference_mode_enabled()
    ):
        found = torch.repeat_interleave(on_device(counts, device), output_size=sum(counts))
        _LAST.counts, _LAST.found = counts, found
    return found


def plus_per_key(ids: Tensor, constants: Tensor, features: KeyedJaggedTensor) -> Tensor:
    """Values (N,) of a batch's keys, and to those of each key its constant added."""
    count = common_count(features)
    if count is None:
        return ids + per_value(constants, features)
    return (ids.view(len(constants), count) + constants.unsqueeze(1)).view(-1)


def padded(values: Tensor, counts: Sequence[int], most: int) -> Tensor:
    """The values of keys as a rectangle (keys, most), in as many operations for any keys.

    Args:
        values: (sum of counts,) integers, key after key, and not none.
        counts: how many each key has.
        most: no fewer than any key has.

    Returns:
        Behind a key's values its last one again and again; zeros for a key without any.
    """
    ends = [*accumulate(counts)]
    if known_equal(counts, most):
        return values.view(len(counts), most)
    starts = [end - count for end, count in zip(ends, counts)]
    own = on_device([*starts, *(max(0, end - 1) for end in ends)], values.device).view(2, -1, 1)
    places = torch.minimum(torch.arange(most, device=values.device) + own[0], own[1])
    found = values.index_select(0, places.view(-1)).view(places.shape)
    if not all(counts):
        found = found * on_device([min(1, count) for count in counts], values.device).unsqueeze(1)
    return found


def beside_ids(features: KeyedJaggedTensor, constants: Constant) -> tuple[Tensor, Tensor]:
    """The ids of a batch, and constants of its keys of a shape that broadcasts over them.

    Args:
        features: any number of values for each key.
        constants: (constants, keys), as `Constant.stacked` makes them.

    Returns:
        int64 ids, (keys, count) where all keys have equally many, else (N,); and (constants, keys, 1) or
        (constants, N).
    """
    ids = features.values().to(torch.int64)
    own = constants.on(ids.device)
    count = common_count(features)
    if count is None:
        return ids, per_value(own, features)
    return ids.view(len(features.keys()), count), own.unsqueeze(2)


class RepeatFeatures(nn.Module):
    """Repeats features, each as many times as it is looked up, key by key.

    Args:
        keys: names of the look-ups.
        sources: for each look-up, the position of its feature among the incoming keys.
    """

    def __init__(self, keys: Sequence[str], sources: Sequence[int]) -> None:
        super().__init__()
        self._keys = list(keys)
        self._sources = list(sources)
        self._index = Constant(self._sources)
        self._is_identity = self._sources == list(range(len(self._sources)))

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        if self._is_identity:
            return renamed(features, self._keys, features.values())
        count = common_count(features)
        if count is None:
            return renamed(features.permute(self._sources), self._keys)
        index = self._index.on(features.device())
        num_keys = len(features.keys())
        weights = features.weights_or_none()
        return KeyedJaggedTensor(
            keys=self._keys,
            values=features.values().view(num_keys, count)[index].view(-1),
            weights=None if weights is None else weights.view(num_keys, count)[index].view(-1),
            lengths=features.lengths().view(num_keys, -1)[index].view(-1),
            stride=features.stride(),
            length_per_key=[count] * len(self._keys),
        )

    def around(self, features: KeyedJaggedTensor, values: Tensor) -> KeyedJaggedTensor:
        """Values of repeated features, already made, in the bags of these.

        Args:
            features: as they come.
            values: of each look-up, look-up after look-up.
        """
        index = self._index.on(features.device())
        weights, counts = features.weights_or_none(), features.length_per_key()
        if weights is not None and not self._is_identity:
            parts = weights.split(counts)
            weights = torch.cat([parts[source] for source in self._sources])
        return KeyedJaggedTensor(
            keys=self._keys,
            values=values,
            weights=weights,
            lengths=features.lengths().view(len(counts), -1)[index].view(-1),
            stride=features.stride(),
            length_per_key=[counts[source] for source in self._sources],
        )


def renamed(
    features: KeyedJaggedTensor, keys: list[str], values: Tensor | None = None
) -> KeyedJaggedTensor:
    """The same bags under other keys, and with other values when they are given."""
    return KeyedJaggedTensor(
        keys=keys,
        values=features.values() if values is None else values,
        weights=features.weights_or_none(),
        lengths=features.lengths(),
        offsets=features.offsets_or_none(),
        stride=features.stride(),
        length_per_key=features.length_per_key(),
    )


class HashRoute(nn.Module):
    """Sends every id to one hashed row per look-up.

    Args:
        keys: names of the look-ups.
        sources: for each look-up, the position of its feature among the incoming keys.
        salts: for each look-up, its signed 64-bit salt.
        num_rows: for each look-up, the rows that it chooses among.
    """

    def __init__(
        self,
        keys: Sequence[str],
        sources: Sequence[int],
        salts: Sequence[int],
        num_rows: Sequence[int],
    ) -> None:
        super().__init__()
        self._keys = list(keys)
        self.copies = RepeatFeatures(keys, sources)
        self._constants = Constant.stacked(Constant(salts), Constant(num_rows))
        self._hashed = [np.array(each, dtype=np.int64) for each in (salts, num_rows)]
        self._fused = FusedRoutes(
            by_key={
                key: [HashedRow(salt=salt, num_rows=rows)]
                for key, salt, rows in zip(keys, salts, num_rows)
            },
            limits=[None] * (max(sources, default=-1) + 1),
        )

    def fused_routes(self) -> FusedRoutes:
        """One hashed row under each key, of any id."""
        return self._fused

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        copies = self.copies(features)
        values = copies.values()
        if is_hashable(values):
            counts = copies.length_per_key()
            return renamed(copies, self._keys, hash_each(values, counts, *self._hashed))
        ids, (salts, num_rows) = beside_ids(copies, self._constants)
        return renamed(copies, self._keys, hash_rows(ids, salts, num_rows).view(-1))
