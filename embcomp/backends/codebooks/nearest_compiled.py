"""The nearest codeword by compiled code."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from embcomp.io.compiled_library import optional_library

_GROUP = 16  # codewords; `nearest.cpp` has the same


@lru_cache
def library() -> ctypes.CDLL | None:
    """The compiled search, built where it is not there yet; None where it cannot be."""
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    found = optional_library(
        "embcomp.backends.codebooks",
        "nearest.cpp",
        {
            "embcomp_nearest": (
                None,
                [*[pointer] * 6, *[integer] * 4, ctypes.c_float, pointer, ctypes.c_int32],
            ),
            "embcomp_nearest_group": (integer, []),
        },
        flags=["-ffp-contract=off"],
    )
    assert found is None or found.embcomp_nearest_group() == _GROUP
    return found


class CompiledBooks:
    """Codebooks, laid out for the compiled search.

    Args:
        words: (G, k, d) float32 codewords.
        moved: the same, counted from their centres.
        centres: (G, d) float32.
        reaches: (G,) float32, of each the longest codeword.
        factor: two scores of a vector of norm p, counted from the centre, for words no longer than r, can
            differ by rounding by at most `factor * (p + r) * r`.
    """

    def __init__(
        self, words: Tensor, moved: Tensor, centres: Tensor, reaches: Tensor, factor: float
    ) -> None:
        books, count, width = moved.shape
        self._groups, self._factor = -(-count // _GROUP), factor
        self._centres, self._reaches = centres.contiguous(), reaches.contiguous()
        plain = words.new_full((books, width, self._groups * _GROUP), torch.inf)
        plain[:, :, :count] = words.transpose(1, 2)
        self._words = _in_groups(plain, self._groups)
        lines = moved.new_zeros(books, width + 1, self._groups * _GROUP)
        lines[:, width] = -torch.inf
        lines[:, :width, :count] = moved.transpose(1, 2)
        lines[:, width, :count] = moved.square().sum(2) / -2
        self._lines = _in_groups(lines, self._groups)

    def search(self, vectors: Tensor, which: Tensor, codes: Tensor) -> None:
        """Write codes (R, K) of vectors (R, K, d) in the codebooks `which` (K,)."""
        found = library()
        assert found is not None and codes.is_contiguous()
        rows, columns, width = vectors.shape
        held, books = vectors.contiguous(), which.contiguous()
        found.embcomp_nearest(
            held.data_ptr(),
            self._words.data_ptr(),
            self._lines.data_ptr(),
            self._centres.data_ptr(),
            self._reaches.data_ptr(),
            books.data_ptr(),
            rows,
            columns,
            width,
            self._groups,
            self._factor,
            codes.data_ptr(),
            torch.get_num_threads(),
        )


def _in_groups(lines: Tensor, groups: int) -> Tensor:
    """(G, n, groups * _GROUP) numbers of codewords, those of a group together: (G, groups, n, _GROUP)."""
    return lines.view(*lines.shape[:2], groups, _GROUP).transpose(1, 2).contiguous()
