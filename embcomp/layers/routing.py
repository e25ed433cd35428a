"""What routes share: the shape of a batch of ids, and ids hashed for many look-ups at once."""

from __future__ import annotations

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
    """One constant per key `(keys,)` repeated for each of the key's values `(N,)`."""
    count = common_count(features)
    if count is not None:  # what every exporter can say
        return constants.unsqueeze(1).expand(-1, count).reshape(-1)
    counts = on_device(features.length_per_key(), constants.device)
    return constants.repeat_interleave(counts, output_size=features.values().numel())


def beside_ids(
    features: KeyedJaggedTensor, constants: Sequence[Constant]
) -> tuple[Tensor, list[Tensor]]:
    """The ids of a batch, and constants of its keys of a shape that broadcasts over them.

    Args:
        features: any number of values for each key.
        constants: one value for each key, each.

    Returns:
        int64 ids, (keys, count) where all keys have equally many, else (N,); and the constants.
    """
    ids = features.values().to(torch.int64)
    own = [constant.on(ids.device) for constant in constants]
    count = common_count(features)
    if count is None:
        return ids, [per_value(constant, features) for constant in own]
    return ids.view(len(features.keys()), count), [constant.unsqueeze(1) for constant in own]


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
        self._salts = Constant(salts)
        self._num_rows = Constant(num_rows)
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
        ids, (salts, num_rows) = beside_ids(copies, (self._salts, self._num_rows))
        return renamed(copies, self._keys, hash_rows(ids, salts, num_rows).view(-1))
