"""How a collection that nobody sharded reads its rows: by compiled code where that can, else by torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embcomp.collection.compiled_rows import KeyRead, ReadBags, RowReads, are_readable
from embcomp.collection.each_pair import key_widths
from embcomp.collection.groups import Group
from embcomp.layers.host_values import reads_wait
from embcomp.layers.rows_by_key import RowsByKey

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class RowReader:
    """Reads the rows of one inner collection for some methods.

    Args:
        groups: the methods, in order.
        joined: look-ups whose rows are wanted side by side where keys are read by themselves.
    """

    def __init__(self, groups: Sequence[Group], joined: Sequence[tuple[str, ...]] = ()) -> None:
        widths = [width for group in groups for width in key_widths(group.backend)]
        self._keys, self._widths = [key for key, _ in widths], dict(widths)
        owners = {k: t.name for g in groups for t in g.backend.physical_tables for k in t.keys}
        self._owners = {key: owners[key] for key in self._keys}
        self._tables = list(dict.fromkeys(self._owners.values()))
        together = {key: keys for keys in joined for key in keys}
        self._parts = list(dict.fromkeys(together.get(key, (key,)) for key in self._keys))
        self._pooled = self._reads([tuple(self._keys)] if self._keys else [])
        self._by_key = self._reads(self._parts)

    def _reads(self, outputs: Sequence[tuple[str, ...]]) -> RowReads:
        places: dict[str, tuple[int, int]] = {}
        for n, keys in enumerate(outputs):
            ends = list(accumulate(self._widths[key] for key in keys))
            places |= {key: (n, end - self._widths[key]) for key, end in zip(keys, ends)}
        reads = [
            KeyRead(
                table=self._tables.index(self._owners[key]),
                width=self._widths[key],
                output=places[key][0],
                into=places[key][1],
            )
            for key in self._keys
        ]
        return RowReads(reads, [sum(self._widths[key] for key in keys) for keys in outputs])

    def pooled(self, inner: nn.Module, bags: Any) -> Any:
        """The rows of each bag, added up: what TorchRec's collection gives, padding perhaps cut off.

        Args:
            inner: what holds the rows, sharded or not.
            bags: for each key equally many; or what a tracer has in their place.
        """
        weights = self._weights(inner, bags)
        if weights is None or bags.inverse_indices_or_none() is not None:
            return inner(bags)
        assert isinstance(inner, EmbeddingBagCollection)
        (found,) = self._pooled.sums(weights, _as_read(bags, weighted=inner.is_weighted()))
        return KeyedTensor(keys=self._keys, length_per_key=[*self._widths.values()], values=found)

    def by_key(self, inner: EmbeddingBagCollection, bags: KeyedJaggedTensor) -> RowsByKey:
        """The rows of keys that have numbers of bags of their own; nothing is padded.

        Args:
            inner: what holds the rows; not sharded.
            bags: for each key as many bags as it has values.
        """
        weights = self._weights(inner, bags)
        if weights is None:
            return RowsByKey({(key,): rows for key, rows in self._by_torch(inner, bags).items()})
        found = self._by_key.sums(weights, _as_read(bags, weighted=False))
        return RowsByKey(dict(zip(self._parts, found)))

    def _weights(self, inner: nn.Module, bags: Any) -> list[Tensor] | None:
        """The tables' rows; None where compiled code cannot read them, or others must know of it."""
        if torch.compiler.is_compiling() or not isinstance(bags, KeyedJaggedTensor):
            return None
        if (
            not isinstance(inner, EmbeddingBagCollection)
            or type(inner) is not EmbeddingBagCollection
        ):
            return None  # one of another kind reads in a way of its own
        bags_of = dict(inner.embedding_bags.named_children())
        held = [bag for name in self._tables if type(bag := bags_of.get(name)) is nn.EmbeddingBag]
        if len(held) < len(self._tables) or bags.keys() != self._keys:
            return None
        if any(getattr(module, hooks) for module in (inner, *held) for hooks in _HOOKS):
            return None
        weights = [bag.weight for bag in held]
        others = bags.values(), bags.lengths_or_none(), bags.weights_or_none()
        return weights if are_readable(weights, *others) else None

    def _by_torch(
        self, inner: EmbeddingBagCollection, bags: KeyedJaggedTensor
    ) -> dict[str, Tensor]:
        ids = bags.values().split(bags.length_per_key())
        lengths = bags.lengths().split(bags.stride_per_key())
        return {
            key: _read(inner.embedding_bags[self._owners[key]].weight, *own)[:, : self._widths[key]]
            for key, own in zip(bags.keys(), zip(ids, lengths))
        }


def _as_read(bags: KeyedJaggedTensor, *, weighted: bool) -> ReadBags:
    """The bags of a batch as compiled code reads them."""
    lengths, weights = bags.lengths(), bags.weights() if weighted else None
    alone = _are_ones(lengths)
    return ReadBags(
        counts=bags.length_per_key(),
        bags=bags.stride_per_key(),
        size=1 if alone else 0,
        offsets=None if alone else _offsets(lengths),
        ids=bags.values().to(torch.int64).contiguous(),
        weights=None if weights is None else weights.float().contiguous(),
    )


def _are_ones(lengths: Tensor) -> bool:
    return bool((lengths == 1).all())


def _offsets(lengths: Tensor) -> Tensor:
    """(n + 1,) int64."""
    ends = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=ends[1:])
    return ends


def _read(weight: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """The rows of ids (N,), added up in bags of lengths (R,): (R, columns)."""
    if not reads_wait(ids.device) and len(ids) == len(lengths) and _are_ones(lengths):
        return F.embedding(ids, weight)
    ends = lengths.cumsum(0)
    offsets = torch.cat((ends.new_zeros(1), ends))
    return F.embedding_bag(ids, weight, offsets, mode="sum", include_last_offset=True)
