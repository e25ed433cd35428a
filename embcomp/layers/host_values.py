"""Values that pass between the host and the device that computes, without either waiting.

A CPU has its values at hand. On other devices a look at one waits until all that was asked for before is
done, in every step; and a compiled graph ends where a value is looked at. Code that would look asks
`reads_wait` first, and has a way without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

AT_HAND = frozenset({"cpu"})
"""Types of devices whose values the host has at hand."""


_PLAIN = (Tensor, nn.Parameter)


def reads_wait(device: torch.device) -> bool:
    """Whether the host cannot look at a tensor's values for nothing."""
    return device.type not in AT_HAND or torch.compiler.is_compiling()


def reads_by_address(*tensors: Tensor | None) -> bool:
    """Whether compiled code can be given the addresses of these tensors just now.

    They are plain tensors or parameters on the CPU, and nothing traces, compiles or transforms.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and all(each is None or type(each) in _PLAIN for each in tensors)
        and all(
            each is None or (each.device.type == "cpu" and not reads_wait(each.device))
            for each in tensors
        )
    )


def known_equal(counts: Sequence[int], value: int) -> bool:
    """Whether all counts are known to be a value: a compiled or exported program may not know them."""
    if torch.compiler.is_dynamo_compiling():
        return all(guard_or_false(count == value) for count in counts)
    if torch.compiler.is_exporting():
        return all(statically_known_true(count == value) for count in counts)
    return all(count == value for count in counts)


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Integers that the host knows, as an int64 tensor (n,) on a device."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.int64, device=device)
    # From page-locked memory the copy is queued; from any other the host would wait for it.
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
