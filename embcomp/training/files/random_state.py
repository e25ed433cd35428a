"""Random states of a rank as tensors and numbers, so that nothing is unpickled to restore them."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from embcomp.training.distributed.process import Process


def random_state(process: Process) -> bytes:
    """The states of torch, numpy and Python, and of the device; read by `restore_random_state`."""
    name, keys, place, has_gauss, gauss = np.random.get_state()
    assert name == "MT19937"
    version, words, next_gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_place": int(place),
        "numpy_gauss": float(gauss) if has_gauss else None,
        "python": torch.tensor(words, dtype=torch.int64),
        "python_version": version,
        "python_gauss": next_gauss,
    }
    if process.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(process.device)
    packed = io.BytesIO()  # torch reports a disk that is full as an internal assertion
    torch.save(state, packed)
    return packed.getvalue()


def restore_random_state(packed: bytes) -> None:
    """Go on with the numbers that come next.

    Args:
        packed: what `random_state` returned.
    """
    state: Mapping[str, Any] = torch.load(io.BytesIO(packed), weights_only=True)
    torch.set_rng_state(state["torch"])
    gauss = state["numpy_gauss"]
    np.random.set_state(
        (
            "MT19937",
            state["numpy"].numpy().astype(np.uint32),
            state["numpy_place"],
            int(gauss is not None),
            0.0 if gauss is None else gauss,
        )
    )
    random.setstate(
        (state["python_version"], tuple(state["python"].tolist()), state["python_gauss"])
    )
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
