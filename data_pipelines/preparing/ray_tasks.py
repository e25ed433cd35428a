"""The side of a `RayEngine` that runs on the machines of the cluster."""

from __future__ import annotations

import hashlib
import pickle
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from embcomp.data_pipelines.preparing.engine import Advance
from embcomp.errors import EmbcompError

PACKAGES = ("embcomp", "polars", "pyarrow", "numpy")
"""What the bytes of pieces depend on."""


def versions_here() -> dict[str, str]:
    """Return the versions of `PACKAGES` in this process."""
    return {name: version(name) for name in PACKAGES}


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Return a SHA-256 of the code that prepares: two states of a checkout have one version."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run_task(payload: bytes, place: str) -> tuple[str, str, Any]:
    """Run one task.

    Args:
        payload: the function and its task, pickled.
        place: this machine's address.

    Returns:
        "done", the address and the result; or "failed", the address and what was wrong.
    """
    # Arrow's own pool keeps much of what it freed, beside what the next task takes.
    pa.set_memory_pool(pa.system_memory_pool())
    function, task = pickle.loads(payload)
    try:
        return "done", place, function(task, _nobody)
    except EmbcompError as error:
        return "failed", place, str(error)


def read_mark(mark: Path, advance: Advance) -> str:
    """Return the text of a file that this machine is to see; empty where it does not."""
    try:
        return mark.read_text(encoding="utf-8")
    except OSError:
        return ""


def _nobody(step: int) -> None:
    """Progress of a task is told when it ends."""
