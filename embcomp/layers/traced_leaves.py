"""Modules as `torch.fx` traces them: those that look at batches are single nodes, whoever traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

from torch import nn
from torch.fx import Proxy

_Function = TypeVar("_Function", bound=Callable[..., Any])


def with_types(forward: _Function) -> _Function:
    """A function whose annotations are types rather than their names, as traced graphs write them out."""
    forward.__annotations__ = get_type_hints(forward)
    return forward


def leaf_call(module: nn.Module, *args: Any) -> Any:
    """A call of a module as one node of the graph that is being traced.

    TorchRec's train pipelines take `route` and `combine` for leaves; other tracers would trace into them
    and stumble over the first look at a batch.

    Args:
        module: part of what is traced.
        args: what it is called with.

    Returns:
        What stands for its result in the graph; None where nothing is traced.
    """
    for argument in args:
        if isinstance(argument, Proxy):
            tracer = argument.tracer
            path = tracer.path_of_module(module)  # type: ignore[attr-defined]
            return tracer.create_proxy("call_module", path, args, {})
    return None
