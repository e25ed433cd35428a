"""The nearest codeword of many vectors at once, exactly.

On the CPU, scores are products in float32, of which the maxima of groups are kept; where rounding could
have decided between two codewords, squared differences in float64 do. So a vector's code is that of a full
search in float64, the first of equals, and depends neither on the batch that the vector is in, nor on the
number of threads, nor on whether compiled code or torch finds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from embcomp.backends.codebooks.nearest_by_differences import nearest_by_differences
from embcomp.backends.codebooks.nearest_compiled import CompiledBooks, library
from embcomp.layers.host_values import reads_wait

_Piece = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_AT_ONCE = 1 << 17  # scores that a thread holds at a time: they stay in a core's cache
_MAXIMA_AT_ONCE = 1 << 18
_FEWEST_COLUMNS = 32  # of a product: narrower ones are slow
_ROUNDING = 2.0**-24
_LONGEST = 1e17  # of what can be squared and added up in float32
_TIE = 4e-16  # twice what rounding in float64 makes of a square


@torch.no_grad()
def nearest(vectors: Tensor, codebooks: Tensor, which: Tensor) -> Tensor:
    """The nearest codeword of every vector, the first of equals.

    Distances are those in float64. On other devices than the CPU they are those in float32, summed
    one dimension after another, so that codewords about as near may be chosen there.

    Args:
        vectors: (R, K, d).
        codebooks: (G, k, d).
        which: (K,) int64, the codebook of each column.

    Returns:
        (R, K) int64 codes in `[0, k)`; any where a vector is not finite.
    """
    return nearest_of_each([vectors], codebooks, [which])[0]


@torch.no_grad()
def nearest_of_each(
    parts: Sequence[Tensor], codebooks: Tensor, which: Sequence[Tensor]
) -> list[Tensor]:
    """`nearest` of several sets of vectors, (R, K, d) each, whose columns have codebooks of their own."""
    codebooks = codebooks.float()
    books = _Compiled(codebooks)
    return [_nearest(part.float(), codebooks, own, books) for part, own in zip(parts, which)]


def _nearest(vectors: Tensor, codebooks: Tensor, which: Tensor, books: _Compiled) -> Tensor:
    compiling = torch.compiler.is_compiling()  # the number of vectors may be unknown
    if not compiling and not vectors.numel():
        return which.new_empty(vectors.shape[:2])
    if codebooks.shape[2] == 1:
        return _on_a_line(vectors[..., 0], codebooks[..., 0], which)
    if compiling or reads_wait(vectors.device):
        return nearest_by_differences(vectors, codebooks, which)
    found = torch.empty(vectors.shape[:2], dtype=torch.int64)
    if library() is not None:
        books.search(vectors, which, found)
        return found
    unsettled = _search_by_torch(vectors, codebooks[which], found)
    if len(unsettled):
        _settle(vectors, codebooks, which, found, unsettled)
    return found


class _Centred:
    """Codewords counted from the mean of their codebook, so that products stay small.

    Args:
        words: (G, k, d) float32.

    Attributes:
        centres: (G, d).
        moved: (G, k, d).
        reaches: (G,) of each the longest of `moved`.
        factor: two scores of a point of norm p, for words no longer than r, can differ by less than
            `factor * (p + r) * r` by rounding alone: a product of d + 1 terms, and centred vectors and words,
            each rounded.
    """

    def __init__(self, words: Tensor) -> None:
        self.centres = words.mean(1)
        self.moved = (words.double() - self.centres.double().unsqueeze(1)).float()
        self.reaches = self.moved.square().sum(2).amax(1).sqrt()
        self.factor = 4 * (words.shape[2] + 5) * _ROUNDING


class _Compiled:
    """Codebooks (G, k, d) as compiled code searches them, laid out when they are first asked for."""

    def __init__(self, codebooks: Tensor) -> None:
        self._codebooks = codebooks
        self._books: CompiledBooks | None = None

    def search(self, vectors: Tensor, which: Tensor, codes: Tensor) -> None:
        """Write the codes (R, K) of vectors (R, K, d) in the codebooks `which` (K,)."""
        if self._books is None:
            own = _Centred(self._codebooks)
            self._books = CompiledBooks(
                self._codebooks, own.moved, own.centres, own.reaches, own.factor
            )
        self._books.search(vectors, which, codes)


def _search_by_torch(vectors: Tensor, words: Tensor, codes: Tensor) -> Tensor:
    """Write the codes of (R, K, d) vectors in (K, k, d) words: (R, K).

    Returns:
        (m, 2) rows and columns where rounding may have decided; their codes mean nothing.
    """
    books = _Books(words, len(vectors))
    unsettled = []
    for start in range(0, len(vectors), books.rows_at_once):
        own = slice(start, start + books.rows_at_once)
        columns, rows = books.search(vectors[own], codes[own]).unbind(1)
        unsettled.append(torch.stack([rows + start, columns], dim=1))
    return torch.cat(unsettled)


def _settle(
    vectors: Tensor, codebooks: Tensor, which: Tensor, codes: Tensor, unsettled: Tensor
) -> None:
    """Write what a full search in float64 finds at (m, 2) rows and columns."""
    for part in unsettled.split(max(1, _AT_ONCE // codebooks.shape[1])):
        row, column = part.unbind(1)
        own, words = vectors[row, column].double(), codebooks[which[column]].double()
        distances = (own[:, None, 0] - words[..., 0]).square_()  # (m, k)
        for axis in range(1, vectors.shape[2]):
            distances += (own[:, None, axis] - words[..., axis]).square_()
        codes[row, column] = distances.argmin(1)


class _Books:
    """Codebooks of K columns, laid out for products: codewords stand in groups, the last one filled up.

    What a search needs in memory is allocated once.

    Args:
        words: (K, k, d) float32.
        most: rows that are searched for at once, at the most.
    """

    def __init__(self, words: Tensor, most: int) -> None:
        books, count, width = words.shape
        own = _Centred(words)
        self._centres, self._reach, self._factor = own.centres, own.reaches, own.factor
        moved = own.moved
        self._size = 1 << ((count - 1).bit_length() + 1) // 2  # of a group
        self._groups = -(-count // self._size)
        self._lines = words.new_zeros(books, self._groups * self._size, width + 1)
        self._lines[:, :, width] = -torch.inf
        self._lines[:, :count] = torch.cat([moved, moved.square().sum(2, keepdim=True) / -2], 2)
        rows = _MAXIMA_AT_ONCE // (books * (self._groups + self._size))
        self.rows_at_once = min(most, 1 << max(5, rows.bit_length() - 1))
        self._columns = words.new_ones(books, width + 1, self.rows_at_once)
        self._maxima = words.new_empty(books, self._groups + self._size, self.rows_at_once)
        self._counts = self._code_and_count().expand(books, -1, -1)
        self._pieces = list(self._cut(self.rows_at_once))

    def _code_and_count(self) -> Tensor:
        """What a product with ones at maxima, of groups and of places, adds up: a code, their number."""
        groups, places = torch.arange(self._groups) * self._size, torch.arange(self._size)
        codes = torch.cat([groups, places]).float()
        return torch.stack([codes, torch.ones_like(codes)])

    def _cut(self, rows: int) -> Iterator[_Piece]:
        """Books and so many rows in pieces: lines, columns, room for their scores, and for maxima."""
        books, count, _ = self._lines.shape
        width = min(rows, max(_FEWEST_COLUMNS, _AT_ONCE * torch.get_num_threads() // count))
        depth = min(books, max(1, _AT_ONCE * torch.get_num_threads() // (count * width)))
        room = self._lines.new_empty(depth * count * width)
        parts = (each[..., :rows].split(depth) for each in (self._columns, self._maxima))
        for lines, *own in zip(self._lines.split(depth), *parts):
            for columns, maxima in zip(*(each.split(width, dim=2) for each in own)):
                shape = (len(lines), self._groups, self._size, columns.shape[2])
                scores = room[: math.prod(shape)].view(shape)
                group, place = maxima.split([self._groups, self._size], dim=1)
                yield lines, columns, scores.flatten(1, 2), scores, group, place

    def search(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Write the codes of (r, K, d) rows: (r, K).

        Returns:
            (m, 2) the columns and rows where rounding may have decided; their codes mean nothing.
        """
        maxima, points = self._maxima[..., : len(rows)], self._columns[:, :-1, : len(rows)]
        torch.sub(rows.permute(1, 2, 0), self._centres.unsqueeze(2), out=points)
        self._find_maxima(len(rows))
        best = maxima[:, : self._groups].amax(1)
        rounding = self._rounding(points, best)
        # The second best codeword is the best of another group, or of another place in its group.
        maxima.ge_((best - rounding).unsqueeze(1))
        code, near = torch.bmm(self._counts, maxima).unbind(1)
        codes.copy_(code.t())
        return ((near != 2) | rounding.isinf()).nonzero()

    def _find_maxima(self, rows: int) -> None:
        """Find the largest score of each group, and of each place in one, for the first columns."""
        pieces = self._pieces if rows == self.rows_at_once else self._cut(rows)
        for lines, columns, products, scores, group, place in pieces:
            torch.bmm(lines, columns, out=products)
            torch.amax(scores, 2, out=group)
            torch.amax(scores, 1, out=place)

    def _rounding(self, points: Tensor, best: Tensor) -> Tensor:
        """More than the scores of the nearest codewords of points (K, d, r) can differ by rounding alone.

        Codewords count that are nearly as near as the best: twice as far as that one and the point's own
        norm, a codeword loses by more than a third of its squared distance. So one that lies far out does
        not bring all others into doubt. What float64 cannot tell apart is in doubt, too, and all is where
        numbers are too large. The least number is there for what is too small to be squared.

        Args:
            points: (K, d, r), counted from the centres.
            best: (K, r) their largest scores.

        Returns:
            (K, r).
        """
        squares = points.square().sum(1)
        distances = torch.sub(squares, best, alpha=2).clamp_(min=0).sqrt_()
        norms = squares.sqrt_()
        near = distances.add_(norms).mul_(2)
        torch.minimum(near, self._reach.unsqueeze(1), out=near)
        is_large = (norms >= _LONGEST) | (self._reach >= _LONGEST).unsqueeze(1)
        norms.add_(near)
        tie = norms * (_TIE * (points.shape[1] + 3))
        rounding = norms.mul_(near.mul_(self._factor).add_(tie)).add_(1e-36)
        return rounding.masked_fill_(is_large, torch.inf)


def _on_a_line(values: Tensor, codebooks: Tensor, which: Tensor) -> Tensor:
    """The same in one dimension, by binary search: (R, K), (G, k) -> (R, K)."""
    ordered, order = codebooks.sort(dim=1, stable=True)
    ordered, order = ordered[which], order[which]  # (K, k)
    wanted = values.t().contiguous()  # (K, R)
    above = torch.searchsorted(ordered, wanted)
    below = (above - 1).clamp_(min=0)
    below = torch.searchsorted(ordered, ordered.gather(1, below))  # the first of equal codewords
    most = ordered.shape[1] - 1  # beyond it lies what is no number
    above.clamp_(max=most)
    below.clamp_(max=most)
    exact = wanted.double()
    low, high = ((ordered.gather(1, at).double() - exact).square_() for at in (below, above))
    codes_low, codes_high = order.gather(1, below), order.gather(1, above)
    codes = torch.where(low < high, codes_low, codes_high)
    return torch.where(low == high, torch.minimum(codes_low, codes_high), codes).t()
