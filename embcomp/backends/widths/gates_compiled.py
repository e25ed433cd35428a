"""Compiled code for gated rows, on the CPU."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from embcomp.io.compiled_library import optional_library
from embcomp.layers.host_values import reads_by_address

# A row's columns may be summed in any order: nothing else depends on it.
_FLAGS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")


@lru_cache
def library() -> ctypes.CDLL | None:
    """The compiled code, built where it is not there yet; None where it cannot be."""
    integer, pointer, short = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
    sizes = [integer, integer]
    functions = {
        "embcomp_norms": (None, [pointer, *sizes, short, pointer]),
        "embcomp_gate": (None, [*[pointer] * 3, *sizes, pointer]),
        "embcomp_gate_grads": (
            None,
            [*[pointer] * 5, *sizes, short, ctypes.c_float, pointer, pointer],
        ),
    }
    return optional_library("embcomp.backends.widths", "gates.cpp", functions, flags=_FLAGS)


def is_readable(*tensors: Tensor | None) -> bool:
    """Whether compiled code can read these tensors just now: plain ones, contiguous, on the CPU."""
    given = [each for each in tensors if each is not None]
    return (
        reads_by_address(*given)
        and all(each.is_contiguous() for each in given)
        and all(each.dtype in (torch.float32, torch.int64) for each in given)
        and library() is not None
    )


def norms_of(rows: Tensor, norm: int) -> Tensor:
    """(N, D) float32 -> (N,) the L1 or L2 norms."""
    found, built = torch.empty(len(rows)), library()
    assert built is not None
    built.embcomp_norms(rows.data_ptr(), *rows.shape, norm, found.data_ptr())
    return found


def gated(rows: Tensor, u: Tensor, widths: Tensor | None) -> Tensor:
    """(N, D) float32 rows whose u (N,) is positive, cut to their first widths (N,) columns."""
    found, built = torch.empty_like(rows), library()
    assert built is not None
    built.embcomp_gate(
        rows.data_ptr(), u.data_ptr(), _pointer(widths), *rows.shape, found.data_ptr()
    )
    return found


def gate_grads(
    rows: Tensor,
    grads: Tensor,
    norms: Tensor,
    u: Tensor,
    widths: Tensor | None,
    *,
    norm: int,
    mean: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of rows (N, D) and of u (N,) for gradients (N, D) of `gated`.

    Args:
        rows: float32.
        grads: of what came out.
        norms: (N,) of the rows.
        u: (N,) norms over their mean, less a threshold.
        widths: (N,) columns that are left; None leaves all.
        norm: 1 or 2.
        mean: what norms are measured in.
    """
    found, pulls, built = torch.empty_like(rows), torch.empty(len(rows)), library()
    assert built is not None
    built.embcomp_gate_grads(
        rows.data_ptr(), grads.data_ptr(), norms.data_ptr(), u.data_ptr(), _pointer(widths),
        *rows.shape, norm, mean, found.data_ptr(), pulls.data_ptr(),
    )  # fmt: skip
    return found, pulls


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
