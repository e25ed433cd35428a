"""How the passes of `prepare` map pure functions over parts: in this process, or on an engine elsewhere.

A pass writes down what is to be done for a part as a task, a small frozen object that can be pickled,
and hands a function and its tasks to an `Engine`. The function returns what is small and leaves what is
large in files that the task names, each whole or not at all. Equal tasks give equal bytes wherever and
however often they run, so an engine may repeat one, on another machine and in any order.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from typing_extensions import override

from embcomp.data_pipelines.preparing.pieces import Content
from embcomp.data_pipelines.preparing.workspace import Workspace
from embcomp.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]
Function = Callable[[Task, Advance], Result]
"""What a pass does for one part; `advance` is told of progress on the way, in the pass's own units."""


class EngineError(DataError):
    """An engine that cannot go on. What is finished stays, and the same call goes on from there."""


class Engine(ABC):
    """What runs the functions of passes.

    Attributes:
        is_here: whether functions run in this process.
    """

    is_here: bool = False

    def begin(self, memory: int, mark: Path) -> None:  # noqa: B027 - nothing to look at here
        """Check, before the first task, that tasks can run.

        Args:
            memory: bytes that a task may take in all.
            mark: a file of the unfinished dataset that every task is to see.

        Raises:
            DataError: they cannot.
        """

    @abstractmethod
    def map(
        self,
        function: Function[Task, Result],
        tasks: Sequence[Task],
        advance: Advance,
        at_once: int = 1,
    ) -> Iterator[tuple[int, Result]]:
        """Run a function over tasks; yield each one's place and result as it ends, in any order.

        Args:
            function: of a module, so that other processes find it by its name.
            tasks: what it is called with.
            advance: told of progress inside a task, where the engine can see it.
            at_once: how many tasks this process may run at a time, where they run in it.

        Raises:
            DataError: as the function raised it.
            EngineError: the engine cannot go on.
        """


class LocalEngine(Engine):
    """Tasks in this process, in threads where several are to run at a time.

    Results come in the order of tasks, so that what is kept does not depend on which one fails first.
    """

    is_here = True

    @override
    def map(
        self,
        function: Function[Task, Result],
        tasks: Sequence[Task],
        advance: Advance,
        at_once: int = 1,
    ) -> Iterator[tuple[int, Result]]:
        if at_once == 1:
            for place, task in enumerate(tasks):
                yield place, function(task, advance)
            return
        ended = threading.Event()

        def told(step: int) -> None:
            # A task that nobody waits for any more ends at its next block.
            if ended.is_set():
                raise _EndedError
            advance(step)

        with ThreadPoolExecutor(at_once, thread_name_prefix="embcomp-part") as pool:
            coming = [pool.submit(function, task, told) for task in tasks]
            try:
                for place, result in enumerate(coming):
                    yield place, result.result()
            finally:
                ended.set()
                for result in coming:
                    result.cancel()


class _EndedError(Exception):
    """Ends a task whose result is not wanted."""


@dataclass(frozen=True, kw_only=True)
class Part(Generic[Task]):
    """A task whose result is kept: the name of its seal, and its size in the pass's units of progress."""

    seal: str
    task: Task
    size: int


def map_parts(
    engine: Engine,
    work: Workspace,
    function: Function[Task, Content],
    parts: Sequence[Part[Task]],
    kind: type[Content],
    *,
    files: Callable[[Task, Content], Mapping[Path, str]],
    advance: Advance,
    known: Sequence[Content | None] | None = None,
    taken: Callable[[Task, Content], None] = lambda task, result: None,
    at_once: int = 1,
) -> list[Content]:
    """Run a function over the parts that no earlier run finished; seal each result as it comes.

    Args:
        engine: what runs the function.
        work: where seals lie.
        function: of a task and `advance`.
        parts: what is to be done.
        kind: the type of results.
        files: gives the SHA-256 of the files that a task wrote.
        advance: told of progress.
        known: what earlier runs finished, where the caller has looked already.
        taken: called with each new result; may raise to end it all.
        at_once: how many parts this process may work on at a time.

    Returns:
        The results, in the order of `parts`.
    """
    found = list(known) if known is not None else [work.earlier(p.seal, kind) for p in parts]
    for result, part in zip(found, parts):
        if result is not None:
            advance(part.size)
    left = [at for at, result in enumerate(found) if result is None]
    tasks = [parts[at].task for at in left]
    for place, result in engine.map(function, tasks, advance, min(at_once, max(1, len(tasks)))):
        part = parts[left[place]]
        work.seal(part.seal, result, files(part.task, result))
        if not engine.is_here:
            advance(part.size)
        found[left[place]] = result
        taken(part.task, result)
    return [result for result in found if result is not None]
