"""Tasks of `prepare` on a Ray cluster: many machines, any of which may be lost on the way.

Every machine has the same versions of embcomp and of the libraries that the bytes depend on, and sees
the input and the output: folders that all share, or URLs. A task takes one core and at most the memory
that the call allows a process, and Ray starts no more of them on a machine than fit.
"""

from __future__ import annotations

import pickle
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Self, override

from embcomp.data_pipelines.preparing.engine import (
    Advance,
    Engine,
    EngineError,
    Function,
    Result,
    Task,
)
from embcomp.data_pipelines.preparing.ray_tasks import code_digest, read_mark, versions_here
from embcomp.data_pipelines.preparing.workspace import mib
from embcomp.errors import DataError, one_line

_CONNECT_SECONDS = 5.0
_PROBE_SECONDS = 120.0
_RETRIES = 5
_AHEAD = 2
"""Tasks that wait for each that can run, so that no core waits for us."""
_POLL_SECONDS = 5.0


class RayEngine(Engine):
    """A running Ray cluster. Close it, or use it as a context manager.

    Example:
        with RayEngine("10.0.0.1:6379") as engine:
            prepare("s3://logs/day1", "s3://data/day1", importer="criteo", engine=engine)
    """

    def __init__(self, address: str | None = None) -> None:
        """Connect to a cluster.

        Args:
            address: of the cluster's head, as `ray start --head` prints it; None asks Ray
                (`RAY_ADDRESS`, or the cluster that runs on this machine).

        Raises:
            DataError: Ray is not installed, or no cluster answers there.
        """
        self._own = _connect(address)
        self._memory = 0
        self._run = _remote()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster."""
        import ray

        if self._own:
            ray.shutdown()

    @override
    def begin(self, memory: int, mark: Path) -> None:
        """Look at every machine of the cluster, before there is anything to do.

        Raises:
            DataError: a machine has other versions or does not see the output, or none has enough
                memory.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._memory = memory
        nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
        largest = max((int(node["Resources"].get("memory", 0)) for node in nodes), default=0)
        if largest < memory:
            raise DataError(
                f"no machine of the Ray cluster has the {mib(memory)} that max_memory allows each "
                f"task (the largest offers {mib(largest)}); allow less, or start larger ones"
            )
        payload = pickle.dumps((read_mark, mark))
        asked = {
            self._run.options(
                num_cpus=0,
                memory=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(versions_here(), code_digest(), payload): node["NodeManagerAddress"]
            for node in nodes
        }
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=_PROBE_SECONDS)
        if late:
            raise EngineError(
                f"machine {asked[late[0]]} of the Ray cluster does not answer; take it out of the "
                f"cluster, or look at its logs"
            )
        seen, found = mark.read_text(encoding="utf-8"), {}
        for answer in done:
            try:
                found[answer] = self._result(answer)
            except EngineError as error:
                lost = error  # a machine that is lost while it is looked at, as it may be later
        if not found:
            raise lost
        for answer, text in found.items():
            if text != seen:
                raise DataError(
                    f"machine {asked[answer]} of the Ray cluster does not see {mark.parents[2]}, where the "
                    f"dataset is made; give a folder that all machines share, or a URL such as "
                    f"s3://bucket/folder"
                )

    @override
    def map(
        self,
        function: Function[Task, Result],
        tasks: Sequence[Task],
        advance: Advance,
        at_once: int = 1,
    ) -> Iterator[tuple[int, Result]]:
        import ray

        waiting = deque(enumerate(tasks))
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._wanted():
                    place, task = waiting.popleft()
                    payload = pickle.dumps((function, task))
                    answer = self._run.options(memory=self._memory).remote(
                        versions_here(), code_digest(), payload
                    )
                    running[answer] = place
                done, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_SECONDS)
                for answer in done:
                    place = running.pop(answer)
                    yield place, self._result(answer)
        finally:
            for answer in running:
                ray.cancel(answer, force=True)

    def _wanted(self) -> int:
        """How many tasks are to be with Ray at once, for as many machines as there are now."""
        import ray

        found = ray.cluster_resources()
        room = min(found.get("CPU", 1), found.get("memory", self._memory) / max(1, self._memory))
        return max(1, int(room)) * _AHEAD

    def _result(self, answer: Any) -> Any:
        """Return what a task found.

        Raises:
            DataError: what it raised, or that its machine has other versions.
            EngineError: Ray could not run it.
        """
        import ray
        from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

        way_out = "what is finished is kept: the same command goes on from there"
        try:
            kind, place, found = ray.get(answer)
        except OutOfMemoryError:
            raise EngineError(
                f"tasks were killed {_RETRIES + 1} times as a machine of the Ray cluster ran out of "
                f"memory, with max_memory at {mib(self._memory)}; {way_out}, with less of it or on "
                f"larger machines"
            ) from None
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, Exception) else error) from None
        except RayError as error:
            raise EngineError(
                f"the Ray cluster lost a task {_RETRIES + 1} times: {one_line(error)}; {way_out}"
            ) from None
        if kind == "versions":
            raise DataError(_other_versions(place, found))
        if kind == "failed":
            raise DataError(f"{found} (on machine {place})")
        return found


def _connect(address: str | None) -> bool:
    """Connect this process; return whether it was not connected before."""
    try:
        import ray
    except ImportError:
        raise DataError(
            "Ray is not installed; `pip install 'embcomp[ray]'`, here and on every machine"
        ) from None
    if ray.is_initialized():
        return False
    if address is not None and address != "auto":
        _check_answers(address)
    try:
        ray.init(address=address or "auto", logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"at {address}" if address else "on this machine"
        raise DataError(
            f"no Ray cluster could be used {where}: {one_line(error)}; start one with `ray start "
            f"--head` and give its address"
        ) from None
    return True


def _check_answers(address: str) -> None:
    """Raise a DataError where nothing listens, which Ray would try again for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise DataError(
            f"address {address!r} is none of a Ray cluster's head; expected HOST:PORT as `ray start "
            f"--head` prints it, and this machine in the cluster"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise DataError(
            f"no Ray cluster answers at {address}: {one_line(error)}; start one with `ray start "
            f"--head` and give its address"
        ) from None


def _remote() -> Any:
    """What Ray runs on a machine. It is sent as code, so that it works where embcomp is another or absent."""
    import ray

    def run(expected: Mapping[str, str], code: str, payload: bytes) -> tuple[str, str, Any]:
        import os
        from importlib.metadata import PackageNotFoundError, version

        os.environ.setdefault("POLARS_MAX_THREADS", "1")
        place = ray.util.get_node_ip_address()
        found = {}
        for name in expected:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "not installed"
        if found != dict(expected):
            return "versions", place, found
        from embcomp.data_pipelines.preparing import ray_tasks

        if ray_tasks.code_digest() != code:
            return "versions", place, found
        return (*ray_tasks.run_task(payload, place),)

    wrapped: Any = ray.remote(num_cpus=1, max_retries=_RETRIES)(run)
    return wrapped


def _other_versions(place: str, found: Mapping[str, str]) -> str:
    here = versions_here()
    for name, version in here.items():
        if found.get(name) != version:
            return (
                f"machine {place} of the Ray cluster has {name} {found.get(name)}, this one {version}; "
                f"install the same on all of them, as the bytes of a dataset depend on it"
            )
    return (
        f"machine {place} of the Ray cluster has an embcomp {here['embcomp']} whose code differs from "
        f"this one's; install the same on all of them"
    )
