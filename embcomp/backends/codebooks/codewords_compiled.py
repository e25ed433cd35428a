"""Compiled code for codes and for the codewords that vectors chose, on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from embcomp.io.compiled_library import optional_library
from embcomp.layers.host_values import reads_by_address

_CODES = np.dtype(
    [(name, "<u8") for name in ("ids", "rows")]
    + [(name, "<i8") for name in ("count", "start", "step", "first")]
)


@lru_cache
def library() -> ctypes.CDLL | None:
    """The compiled code, built where it is not there yet; None where it cannot be."""
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    sizes = [integer, integer]
    found = optional_library(
        "embcomp.backends.codebooks",
        "codewords.cpp",
        {
            "embcomp_gather_codes": (
                None,
                [pointer, *sizes, pointer, integer, ctypes.c_int32],
            ),
            "embcomp_snap": (None, [*[pointer] * 3, *sizes, pointer, pointer]),
            "embcomp_total": (None, [*[pointer] * 4, *sizes, pointer]),
            "embcomp_codes_bytes": (integer, []),
        },
        flags=["-ffp-contract=off"],
    )
    assert found is None or found.embcomp_codes_bytes() == _CODES.itemsize
    return found


def is_readable(*tensors: Tensor) -> bool:
    """Whether compiled code can read these tensors just now: plain ones, contiguous, on the CPU."""
    return (
        reads_by_address(*tensors)
        and all(each.is_contiguous() for each in tensors)
        and library() is not None
    )


def gather_codes(
    packed: Tensor,
    bits: int,
    ids: Tensor,
    counts: Sequence[int],
    *,
    sources: np.ndarray,
    starts: np.ndarray,
    steps: np.ndarray,
    firsts: np.ndarray,
) -> Tensor:
    """Rows that packed codes name, look-up after look-up: `first + code[start + step * id]`.

    Args:
        packed: uint8, as `pack_bits` packs them.
        bits: of a code.
        ids: (sum of counts,) int64, all of them ids that have codes.
        counts: how many ids each feature has.
        sources: (keys,) the feature of each look-up.
        starts: (keys,) the code of id 0.
        steps: (keys,) codes of an id.
        firsts: (keys,) the row of code 0.

    Returns:
        int64, of the ids of each look-up.
    """
    sizes = np.array(counts, dtype=np.int64)
    begins, own = np.cumsum(sizes) - sizes, sizes[sources]
    found = torch.empty(int(own.sum()), dtype=torch.int64)
    codes = np.zeros(len(sources), dtype=_CODES)
    codes["ids"] = ids.data_ptr() + 8 * begins[sources]
    codes["rows"] = found.data_ptr() + 8 * (np.cumsum(own) - own)
    codes["count"], codes["start"], codes["step"], codes["first"] = own, starts, steps, firsts
    built = library()
    assert built is not None
    built.embcomp_gather_codes(
        packed.data_ptr(), packed.numel(), bits, codes.ctypes.data, len(codes),
        torch.get_num_threads(),
    )  # fmt: skip
    return found


def snap(vectors: Tensor, slots: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """The words that vectors chose, and the squared distances.

    Args:
        vectors: (n, d) float32.
        slots: (n,) int64.
        words: (words, d) float32.

    Returns:
        (n, d) and (n,).
    """
    found, gaps = torch.empty_like(vectors), torch.empty(len(vectors))
    built = library()
    assert built is not None
    built.embcomp_snap(
        vectors.data_ptr(), slots.data_ptr(), words.data_ptr(), *vectors.shape,
        found.data_ptr(), gaps.data_ptr(),
    )  # fmt: skip
    return found, gaps


def add_totals(
    totals: Tensor, vectors: Tensor, slots: Tensor, gaps: Tensor, chosen: Tensor | None
) -> None:
    """Add vectors to the totals of the words that they chose: how many, their sum, their distances.

    Args:
        totals: (words, d + 2) float32.
        vectors: (n, d) float32.
        slots: (n,) int64.
        gaps: (n,) float32 squared distances.
        chosen: (n,) bool which vectors count; None when all do.
    """
    built = library()
    assert built is not None
    built.embcomp_total(
        vectors.data_ptr(), slots.data_ptr(), gaps.data_ptr(),
        None if chosen is None else chosen.data_ptr(), *vectors.shape, totals.data_ptr(),
    )  # fmt: skip
