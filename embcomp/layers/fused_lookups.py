"""What a fused look-up is told of a method: where an id's rows are, and what an embedding makes of them.

Serving can answer for all features of a collection in one call (`embcomp.serving.fused`). A method
takes part when its `route` says which row of each physical look-up an id has, and its `combine` how
rows make an embedding; a method that says nothing is served by its modules as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OwnRow:
    """The row that an id is the number of."""


@dataclass(frozen=True, kw_only=True)
class HashedRow:
    """The row that a salted hash chooses (`embcomp.layers.hashing`).

    Args:
        salt: signed, of 64 bits.
        num_rows: how many rows there are to choose from.
    """

    salt: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class HashedBeyond:
    """The row `first + hash` of ids outside `[0, first)`; those have none, and zeros stand for it.

    Args:
        salt: signed, of 64 bits.
        num_rows: how many rows there are to choose from.
        first: the row where they begin.
    """

    salt: int
    num_rows: int
    first: int


@dataclass(frozen=True, kw_only=True)
class QuotientRow:
    """The row `id // divisor`."""

    divisor: int


@dataclass(frozen=True, kw_only=True)
class RemainderRow:
    """The row `first + id % divisor`."""

    divisor: int
    first: int


@dataclass(frozen=True, kw_only=True)
class RankedRow:
    """The number of kept ids before an id, and a shared row for ids that are not kept.

    Args:
        words: (blocks, 4) int64 a bit for each id.
        counts: (blocks,) int32 kept ids before each block of 256.
        first_block: where the table's blocks begin.
        shared: the row of all other ids.
    """

    words: Tensor
    counts: Tensor
    first_block: int
    shared: int


@dataclass(frozen=True, kw_only=True)
class CodedRow:
    """The row that a packed code names, `first + code[start + step * id]`.

    Args:
        codes: uint8, as `pack_bits` packs them.
        bits: of a code.
        step: codes of an id.
        start: the code of id 0.
        first: the row of code 0.
    """

    codes: Tensor
    bits: int
    step: int
    start: int
    first: int


@dataclass(frozen=True, kw_only=True)
class RowWithin:
    """The row `id - low` of ids in `[low, high)`; others have none, and zeros stand for it."""

    low: int
    high: int


IdRoute: TypeAlias = (
    OwnRow
    | HashedRow
    | HashedBeyond
    | QuotientRow
    | RemainderRow
    | RankedRow
    | CodedRow
    | RowWithin
)


@dataclass(frozen=True, kw_only=True)
class FusedRoutes:
    """How ids find their rows.

    Args:
        by_key: for each physical look-up, the rows that are summed under it.
        limits: for each (table, feature) the ids that it takes, `[0, limit)`; None for any id.
    """

    by_key: Mapping[str, Sequence[IdRoute]]
    limits: Sequence[int | None]


@dataclass(frozen=True, kw_only=True)
class PlacedRow:
    """A looked-up row inside an embedding.

    Args:
        key: the place of its look-up among the method's keys.
        into: the embedding's column where it begins.
        start: the first of its columns that are used.
        width: how many are; all when None.
        how: whether it is written, added or multiplied there.
        columns: (width,) the embedding's columns, where they are not side by side; rows are added.
        projection: (row's width, columns) the matrix that makes columns of it.
    """

    key: int
    into: int = 0
    start: int = 0
    width: int | None = None
    how: Literal["set", "add", "multiply"] = "set"
    columns: Tensor | None = None
    projection: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FusedEmbedding:
    """The embedding of one (table, feature).

    Args:
        rows: what it is made of, in order.
        width: its columns; those that no row reaches are zeros.
        scale: a factor on all of it.
    """

    rows: Sequence[PlacedRow]
    width: int
    scale: float = 1.0


@runtime_checkable
class FusableRoute(Protocol):
    """A route that can say how ids find their rows."""

    def fused_routes(self) -> FusedRoutes | None:
        """How; None where this one cannot be fused."""


@runtime_checkable
class FusableCombine(Protocol):
    """A combine that can say how rows make embeddings."""

    def fused_embeddings(self, widths: Sequence[int]) -> Sequence[FusedEmbedding] | None:
        """How, for each (table, feature); None where this one cannot be fused.

        Args:
            widths: of the row of each of the method's keys.
        """


def side_by_side(widths: Sequence[int], dims: Sequence[int]) -> list[FusedEmbedding]:
    """Embeddings that are rows next to each other, cut or filled with zeros to their width.

    Args:
        widths: of the row of each key.
        dims: for each (table, feature), the width that its rows have together.
    """
    found, key = [], 0
    for dim in dims:
        rows: list[PlacedRow] = []
        came = 0
        while came < dim:
            rows.append(PlacedRow(key=key, into=came))
            came += widths[key]
            key += 1
        found.append(FusedEmbedding(rows=rows, width=dim))
    return found


def fitted(embedding: FusedEmbedding, widths: Sequence[int], dim: int) -> FusedEmbedding:
    """An embedding cut, or filled with zeros, to another width.

    Args:
        embedding: rows side by side.
        widths: of the row of each key.
        dim: the width that is wanted.
    """
    rows = [
        PlacedRow(key=row.key, into=row.into, width=min(widths[row.key], dim - row.into))
        for row in embedding.rows
        if row.into < dim
    ]
    return FusedEmbedding(rows=rows, width=dim)
