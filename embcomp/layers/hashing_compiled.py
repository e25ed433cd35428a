"""The hash of `embcomp.layers.hashing` by compiled code, on the CPU: the same rows."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from embcomp.io.compiled_library import optional_library
from embcomp.layers.host_values import reads_by_address


@lru_cache
def library() -> ctypes.CDLL | None:
    """The compiled code, built where it is not there yet; None where it cannot be."""
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    functions = {"embcomp_hash": (None, [*[pointer] * 4, integer, pointer])}
    return optional_library("embcomp.layers", "hashing.cpp", functions)


def is_hashable(ids: Tensor) -> bool:
    """Whether compiled code can read ids just now: a plain tensor of int64, contiguous, on the CPU."""
    return (
        reads_by_address(ids)
        and ids.dtype == torch.int64
        and ids.is_contiguous()
        and library() is not None
    )


def hash_each(
    ids: Tensor, counts: Sequence[int], salts: np.ndarray, num_rows: np.ndarray
) -> Tensor:
    """Place the ids of many look-ups in rows.

    Args:
        ids: (sum of counts,) int64, look-up after look-up, as `is_hashable` allows.
        counts: how many ids each look-up has.
        salts: (look-ups,) int64.
        num_rows: (look-ups,) int64, how many rows each has to choose from.

    Returns:
        (sum of counts,) int64.
    """
    found, sizes, built = torch.empty_like(ids), np.array(counts, dtype=np.int64), library()
    assert built is not None and int(sizes.sum()) == len(ids)
    pointers = [each.ctypes.data for each in (sizes, salts, num_rows)]
    built.embcomp_hash(ids.data_ptr(), *pointers, len(sizes), found.data_ptr())
    return found
