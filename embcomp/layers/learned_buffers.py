"""State that a method learns beside its rows: codes, maps and masks as buffers, and losses.

DistributedModelParallel turns the buffers of a `meta` build into zeros and says nothing. Codes of
zeros would send every id to one row, so learnt buffers know whether anyone has filled them, and fill
themselves with a pure function of the config where nobody has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from embcomp.layers.named_parts import NamedParts, persistent_tensors, stored_tensors


class LearnedBuffers(NamedParts):
    """A module whose persistent buffers hold what was learnt.

    A subclass registers its buffers (their shapes fixed by the config), says which of them hold
    parts of single tables (`store_in_parts`), fills them in `reset_buffers`, and calls
    `ensure_filled` first thing in its `forward`.
    """

    filled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filled", torch.zeros((), dtype=torch.uint8), persistent=False)
        self._seen: Tensor | None = None
        self._is_overwritten = False

    def reset_buffers(self) -> None:
        """Fill the buffers in place with what the config alone implies."""
        raise NotImplementedError

    def ensure_filled(self) -> None:
        """Fill the buffers unless that was done, or a state dict brought them."""
        if torch.compiler.is_exporting():  # a program must not depend on values
            if self._seen is None:
                raise ValueError(
                    "expected learnt buffers that are filled before they are exported; call the model "
                    "once, or load a state dict"
                )
            return
        # Moving the module, or materialising it, makes another tensor: only then is it looked at.
        if self._seen is self.filled or self.filled.is_meta:
            return
        if self._is_overwritten:
            return
        if torch.compiler.is_compiling():
            # Not within `no_grad`: a graph that fails there leaves gradients off behind it.
            torch._assert_async(
                self.filled != 0,
                "what a method learns is not there: call the model once, then compile it",
            )
            return
        with torch.no_grad():
            if not bool(self.filled):
                self.reset_buffers()
                self.filled.fill_(1)
        self._seen = self.filled

    @property
    def stored_names(self) -> list[str]:
        """The names of the buffers, or of their parts, in the module's own state dict."""
        own = [name for name in self._buffers if name != "filled"]
        return [part for name in own for part in self.names_of(name)]

    def mark_filled(self) -> None:
        """Say that the buffers hold what they are to hold."""
        self.filled.fill_(1)
        self._seen = self.filled

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if not self.filled.is_meta and not _keeps_values(fn):
            self.filled.zero_()  # `to_empty`: whatever lay in that memory, nobody filled it
            self._seen = None
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.ensure_filled()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        wanted = self.stored_names
        came = [name for name in wanted if prefix + name in state_dict]
        if came and len(came) < len(wanted):
            self.ensure_filled()  # parts that did not come stay as the config implies
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if not self.filled.is_meta and len(came) == len(wanted):
            self.mark_filled()


@torch.no_grad()
def _keeps_values(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function that is applied to all tensors of a module moves them with their values."""
    mark = torch.frombuffer(bytearray(os.urandom(32)), dtype=torch.uint8)
    moved = fn(mark)
    return not moved.is_meta and torch.equal(moved.to("cpu", torch.uint8), mark)


@contextmanager
def overwriting(module: nn.Module, names: Collection[str] | None = None) -> Iterator[None]:
    """Within it, what is about to be overwritten is not filled first; afterwards it counts as filled.

    Args:
        module: of whose state dict tensors are taken and filled in place, or loaded.
        names: of the tensors that come, in its state dict or in that of a module which it wraps; all
            by default.
    """
    parts = [
        part
        for path, part in module.named_modules()
        if isinstance(part, LearnedBuffers)
        and (names is None or all(_is_among(f"{path}.{n}", names) for n in part.stored_names))
    ]
    for part in parts:
        part._is_overwritten = True
    try:
        yield
    finally:
        for part in parts:
            part._is_overwritten = False
    for part in parts:
        if not part.filled.is_meta:
            part.mark_filled()


def _is_among(path: str, names: Collection[str]) -> bool:
    while path not in names:
        _, dot, path = path.partition(".")
        if not dot:
            return False
    return True


def fill_buffers(module: nn.Module) -> None:
    """Fill the learnt buffers inside a module, where nobody has."""
    for part in module.modules():
        if isinstance(part, LearnedBuffers):
            part.ensure_filled()


@torch.no_grad()
def fill_stored(module: nn.Module, fill: Callable[[str, Tensor], None]) -> None:
    """Fill every tensor that a module stores, in place: no copy of it is made.

    Args:
        module: on the CPU.
        fill: called with each name in the module's state dict, and the contiguous tensor to fill; of
            a tensor that is stored in parts, with views of it.
    """
    for name, tensor in stored_tensors(module, persistent_tensors(module)).items():
        fill(name, tensor)
    mark_filled(module)


def mark_filled(module: nn.Module) -> None:
    """Say that the learnt buffers inside a module hold what they are to hold."""
    for part in module.modules():
        if isinstance(part, LearnedBuffers):
            part.mark_filled()


class Penalised(nn.Module):
    """A combine that adds a term to the training loss.

    Attributes:
        penalty: () the term of the last forward pass in training mode; None where there is none.
        planned_steps: of the training; None where nobody said.
    """

    penalty: Tensor | None = None
    planned_steps: int | None = None

    @property
    def stops_rows(self) -> bool:
        """Whether `keeps_row` has an answer."""
        return False

    def keeps_row(self, table: str, rows: Tensor) -> Tensor | None:
        """Which rows of a table pass as it is now: (N,) bool; None where none can be stopped.

        Args:
            table: its name.
            rows: (N, at least its width) any of its rows, zeros behind.
        """
        return None

    def __getstate__(self) -> dict[str, Any]:
        # A penalty hangs on the graph of a forward pass, which no copy of the module can have.
        return {**self.__dict__, "penalty": None}


def penalty_of(module: nn.Module) -> Tensor | None:
    """The sum of the penalties that the parts of a module left in their last forward pass."""
    terms = [
        part.penalty
        for part in module.modules()
        if isinstance(part, Penalised) and part.penalty is not None
    ]
    return torch.stack(terms).sum() if terms else None


class AddPenalty(nn.Module):
    """Adds the penalties of a model's methods to its loss; a child that train pipelines can trace.

    Args:
        model: whose parts are asked after their forward pass. They are not registered here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parts = tuple(part for part in model.modules() if isinstance(part, Penalised))

    @override
    def forward(self, loss: Tensor) -> Tensor:
        for part in self._parts:
            if part.penalty is not None:
                loss = loss + part.penalty
        return loss
