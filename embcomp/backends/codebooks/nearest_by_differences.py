"""The nearest codeword by float32 differences: in compiled graphs, and where kernels are launched.

Distances are taken as many at a time as keep the number of kernels small, since launching them would
take longer than they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_ROWS = 128  # of a block: what is read side by side fills a few vector registers


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How distances are cut into blocks.

    Args:
        distances: as many are taken at a time.
        operations: a block may be larger where more than so many operations would be dispatched;
            None never lets it.
    """

    distances: int
    operations: int | None = None

    def sizes(self, rows: int, columns: int, codewords: int, axes: int) -> tuple[int, int]:
        """Rows and columns of a block."""
        most = self.distances
        if self.operations is not None:
            blocks = max(1, self.operations // (3 * axes + 4))
            most = max(most, -(-rows // blocks) * columns * codewords)
        wide = max(1, min(columns, most // (_LEAST_ROWS * codewords)))
        return max(_LEAST_ROWS, most // (wide * codewords)), wide


FEW_KERNELS = Tiling(distances=1 << 26, operations=96)


@torch.no_grad()
def nearest_by_differences(
    vectors: Tensor, codebooks: Tensor, which: Tensor, *, tiling: Tiling = FEW_KERNELS
) -> Tensor:
    """The nearest codeword of every vector, the first of equals.

    Squared differences are summed in float32 one dimension after another, so that a vector's code
    depends neither on the batch that it is in nor on how that is cut into blocks.

    Args:
        vectors: (R, K, d) float32.
        codebooks: (G, k, d) float32.
        which: (K,) int64, the codebook of each column.
        tiling: how distances are cut into blocks.

    Returns:
        (R, K) int64 codes in `[0, k)`.
    """
    words = codebooks[which].permute(2, 0, 1).contiguous().unsqueeze(3)  # (d, K, k, 1)
    wanted = vectors.permute(2, 1, 0).contiguous().unsqueeze(2)  # (d, K, 1, R): read along R below
    if torch.compiler.is_compiling():  # the number of vectors may be unknown
        return _first_least(_closeness(wanted, words)).t()
    axes, columns, count, _ = words.shape
    rows, wide = tiling.sizes(len(vectors), columns, count, axes)
    parts = [
        _in_columns(wanted[:, at : at + wide], words[:, at : at + wide], rows)
        for at in range(0, columns, wide)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).t()


def _in_columns(wanted: Tensor, words: Tensor, rows: int) -> Tensor:
    """(d, K, 1, R), (d, K, k, 1) -> (K, R) codes, so many rows at a time."""
    found = [_first_least(_closeness(part, words)) for part in wanted.split(rows, dim=3)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _closeness(wanted: Tensor, words: Tensor) -> Tensor:
    """(K, k, R) the negative squared distances of (d, K, 1, R) vectors from (d, K, k, 1) codewords."""
    pairs: Iterator[tuple[Tensor, Tensor]] = zip(wanted.unbind(), words.unbind())
    first, word = next(pairs)
    found = (first - word).square_().neg_()
    for own, word in pairs:
        found -= (own - word).square_()
    return found


def _first_least(closeness: Tensor) -> Tensor:
    """(K, k, R) -> (K, R) where each vector's closeness is largest, the first of equals."""
    if closeness.device.type != "cpu" or torch.compiler.is_compiling():
        return closeness.argmax(1)
    # On CPU torch's argmax goes element by element; pooling with the channels last compares eight
    # vectors at once, and takes a larger value only: the first of equals stays.
    channels_last = closeness.unsqueeze(2).permute(0, 3, 1, 2)  # (K, R, k, 1)
    window = (closeness.shape[1], 1)
    return torch.nn.functional.max_pool2d(channels_last, window, return_indices=True)[1].flatten(1)
