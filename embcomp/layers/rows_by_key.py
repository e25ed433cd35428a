"""Looked-up rows of keys that have numbers of values of their own, each key's rows by themselves.

A rectangle with as many rows as the longest key has values would be mostly padding where one feature
has a hundred values a sample and others have one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import override

from embcomp.layers.lookup_context import LookupContext


@runtime_checkable
class CombinesEach(Protocol):
    """A `combine` that also takes the rows of each (table, feature) by themselves."""

    def each(self, parts: Sequence[Tensor], looked_up: LookupContext) -> list[Tensor]:
        """Make embeddings.

        Args:
            parts: for each (table, feature), (N of its values, physical columns).
            looked_up: what they were looked up for.

        Returns:
            For each, (N, embedding_dim).
        """


@dataclass(frozen=True)
class RowsByKey:
    """Looked-up rows, each key's by themselves, or those of keys of one length side by side.

    Args:
        rows: for each key or keys, (N, columns), without padding.
    """

    rows: Mapping[tuple[str, ...], Tensor]

    def side_by_side(self, keys: Sequence[str]) -> Tensor:
        """(N, columns) of keys of one length, as they came or one by one."""
        found = self.rows.get(tuple(keys))
        return torch.cat([self.rows[key,] for key in keys], dim=1) if found is None else found

    def detached(self) -> RowsByKey:
        """The same, through which no gradient goes."""
        return RowsByKey({keys: rows.detach() for keys, rows in self.rows.items()})


def split_padded(values: Tensor, places: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Cut keys' rows out of a rectangle.

    Args:
        values: (R, C).
        places: for each key, how many rows it has, its first column and how many columns.

    Returns:
        For each key, (rows, columns) of its own, contiguous.
    """
    return list(SplitPadded.apply(values, places))


class SplitPadded(torch.autograd.Function):
    """Slices whose gradients are written into one rectangle, rather than padded and added up."""

    @staticmethod
    @override
    def forward(ctx: Any, values: Tensor, places: Sequence[tuple[int, int, int]]) -> Any:
        ctx.places, ctx.shape = places, values.shape
        return tuple(
            values[:rows, first : first + columns].clone(memory_format=torch.contiguous_format)
            for rows, first, columns in places
        )

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return JoinPadded.apply(ctx.places, ctx.shape, *grads), None


class JoinPadded(torch.autograd.Function):
    """The rectangle of slices, zeros between them: what `SplitPadded` takes apart."""

    @staticmethod
    @override
    def forward(
        ctx: Any, places: Sequence[tuple[int, int, int]], shape: torch.Size, *parts: Tensor
    ) -> Tensor:
        ctx.places = places
        whole = parts[0].new_zeros(shape)
        for part, (rows, first, columns) in zip(parts, places):
            whole[:rows, first : first + columns] = part
        return whole

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *SplitPadded.apply(grads[0], ctx.places)
