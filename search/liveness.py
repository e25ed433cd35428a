"""Who works on a study, and whether that process is still there."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import psutil

_GONE_AFTER = 150.0  # seconds without a sign of life


def this_worker() -> str:
    """This process, as studies name it."""
    process = psutil.Process(os.getpid())
    return f"{socket.gethostname()}:{process.pid}:{process.create_time():.0f}"


def is_alive(worker: str, signs: Mapping[str, Any]) -> bool:
    """Whether a worker still works.

    Args:
        worker: its name.
        signs: the study's attributes, which hold the times of its signs of life.
    """
    host, pid, created = worker.rsplit(":", 2)
    if host == socket.gethostname():
        try:
            process = psutil.Process(int(pid))
            same = abs(process.create_time() - float(created)) < 2
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
    last = signs.get(f"worker {worker}", 0.0)
    return time.time() - float(last) < _GONE_AFTER
