"""A Ray cluster of a test's own on 127.0.0.1, of several nodes that can be killed; gone afterwards."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

_START_SECONDS = 150
_MEMORY = 4 << 30
_STORE = 80 << 20
# Nodes that died are missed after some 5 s rather than 20.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
    # On a machine of two busy cores a node takes its time.
    "RAY_raylet_start_wait_time_s": "120",
    "OMP_NUM_THREADS": "1",
}


def skip_without_ray() -> None:
    """Skip where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed (pip install 'embcomp[ray]')")


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        address: of its head.
        nodes: the processes that hold its nodes, the head first.
    """

    address: str
    folder: Path
    nodes: list[subprocess.Popen] = field(default_factory=list)

    def add_nodes(self, count: int, environment: Mapping[str, str] | None = None) -> None:
        """Start more nodes and wait until the cluster has them.

        One after the other: two that start at once on one machine may choose the same socket, and one dies.
        """
        first = len(self.nodes)
        for number in range(first, first + count):
            arguments = ["--address", self.address]
            self.nodes.append(_start(arguments, self.folder, f"node-{number}", environment or {}))
            self._wait_for(number)

    def _wait_for(self, number: int) -> None:
        end = time.monotonic() + _START_SECONDS
        while not self._joined(number):
            if self.nodes[number].poll() is not None or time.monotonic() > end:
                logs = "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))
                pytest.fail(f"waited in vain for node {number} of Ray:\n{logs}")
            time.sleep(0.2)

    def _joined(self, count: int) -> bool:
        log = (self.folder / f"node-{count}.log").read_text()
        return "Ray runtime started" in log

    def kill_node(self, number: int) -> None:
        """Kill a node as a power cut would: all of its processes at once."""
        _kill_tree(self.nodes[number])


@contextmanager
def cluster(nodes: int) -> Iterator[Cluster]:
    """Start a head that runs no task and some nodes of one core each."""
    skip_without_ray()
    port = _free_port()
    # Sockets of Ray lie below it, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    running = Cluster(address=f"127.0.0.1:{port}", folder=folder)
    try:
        head = ["--head", "--port", str(port), "--include-dashboard", "false"]
        head += ["--temp-dir", str(folder)]
        running.nodes.append(_start([*head, "--num-cpus", "0"], folder, "node-0", {}))
        running._wait_for(0)
        running.add_nodes(nodes)
        yield running
    finally:
        for node in reversed(running.nodes):
            _kill_tree(node)
        _kill_strays(folder)
        shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes that name a cluster's folder: what must be gone when it is."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()):
                found.append(process)
    return found


def _start(
    arguments: list[str], folder: Path, name: str, environment: Mapping[str, str]
) -> subprocess.Popen:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
    command += ["--node-ip-address", "127.0.0.1", "--disable-usage-stats"]
    command += ["--memory", str(_MEMORY), "--object-store-memory", str(_STORE)]
    if "--num-cpus" not in arguments:
        command += ["--num-cpus", "1"]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **_ENVIRONMENT, **environment},
        )


def _kill_tree(process: subprocess.Popen) -> None:
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=10)
    process.wait(timeout=10)


def _kill_strays(folder: Path) -> None:
    """End what a node's processes left: they name the cluster's folder."""
    for process in processes_of(folder):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
