"""What a person sees of the steps of a long piece of work: a bar for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType

from typing_extensions import Self, override

Step = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows a step of so many blocks; what it yields is called with the number of blocks just done."""


def in_silence(name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A step that nobody is shown."""
    return nullcontext(lambda done: None)


class ShownSteps(AbstractContextManager["ShownSteps"]):
    """The progress of work in files, as a context for each step; none is left open behind it.

    Args:
        step: shows a step.
    """

    def __init__(self, step: Step) -> None:
        self._step, self._open = step, ExitStack()
        self._advance: Callable[[int], None] = lambda done: None

    def __enter__(self) -> Self:
        return self

    @override
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def begin(self, name: str, total: int) -> None:
        """A step begins."""
        self._advance = self._open.enter_context(self._step(name, total))

    def advance(self) -> None:
        """A block is done."""
        self._advance(1)

    def wait(self, ranks: Sequence[int]) -> None:
        """There are no others."""

    def end(self) -> None:
        """The step is done."""
        self._open.close()
