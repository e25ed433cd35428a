"""What a device found in a batch, read by the host once it has arrived: a step later, without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class LateFindings:
    """Small tensors on their way to the host, each with what the host knew when they were sent.

    Copies of it begin with nothing on its way.
    """

    def __init__(self) -> None:
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None, Any]] = deque()

    def __getstate__(self) -> dict[str, Any]:
        return {"_sent": deque()}

    def send(self, found: Tensor, known: Any) -> None:
        """Begin to copy a tensor to the host."""
        event = None
        if found.device.type == "cuda":
            host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            found = host.copy_(found, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._sent.append((found, event, known))

    def arrived(self, *, wait: bool) -> Iterator[tuple[Tensor, Any]]:
        """Take what has arrived, in order.

        Args:
            wait: whether to wait for what has not.
        """
        while self._sent:
            found, event, known = self._sent[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._sent.popleft()
            yield found, known
