"""The compiled look-up of artefacts."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from embcomp.io.compiled_library import MissingKernelError, compiled_library


@lru_cache
def library() -> ctypes.CDLL:
    """The compiled look-up, built where it is not there yet.

    Raises:
        MissingKernelError: there is none on this machine; why, in one line.
    """
    return _declared(
        compiled_library("embcomp.serving.fused", "kernel.cpp", flags=["-ffp-contract=off"])
    )


def why_missing() -> str | None:
    """Why look-ups are not compiled here; None where they are."""
    try:
        library()
    except MissingKernelError as missing:
        return str(missing)
    return None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    found.embcomp_lookup.argtypes = [*[pointer] * 5, integer, pointer, ctypes.c_int32]
    found.embcomp_lookup.restype = ctypes.c_int32
    found.embcomp_program_bytes.restype = integer
    found.embcomp_step_bytes.restype = integer
    found.embcomp_feature_bytes.restype = integer
    return found
