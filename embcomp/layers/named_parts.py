"""Tensors that are one for many tables in a step, and stored table by table under the tables' names.

One kernel answers for all tables of a method, so what it learns of them stands in one tensor, table
after table. Where a table stands in it depends on the others. In a state dict each table's part has a
name of its own, `<tensor>@<table>`, so that tables can be reordered, added and removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from embcomp.layers.row_sources import RowSource

Long = TypeVar("Long", bound=Tensor | RowSource)


class NamedParts(nn.Module):
    """A module that stores tensors in parts along their first axis.

    Parts are views: what is read into them in place is read into the tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[str, list[tuple[str, int]]] = {}

    def store_in_parts(self, tensor: str, parts: Sequence[tuple[str, int]]) -> None:
        """Say what a parameter or buffer is made of.

        Args:
            tensor: its name.
            parts: names and sizes in order; those of no size are not stored.
        """
        self._parts[tensor] = [(name, size) for name, size in parts if size]

    def names_of(self, tensor: str) -> list[str]:
        """The names that a parameter or buffer is stored under."""
        if tensor not in self._parts:
            return [tensor]
        return [part_name(tensor, name) for name, _ in self._parts[tensor]]

    def parts_of(self, tensor: str, whole: Long) -> dict[str, Long]:
        """A tensor's parts by the names that they are stored under.

        Args:
            tensor: name of a parameter or buffer.
            whole: its values, in memory or read by range.
        """
        if tensor not in self._parts:
            return {tensor: whole}
        pieces = whole.split([size for _, size in self._parts[tensor]])
        return dict(zip(self.names_of(tensor), pieces))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for tensor in self._parts:
            whole = destination.pop(prefix + tensor)
            for name, part in self.parts_of(tensor, whole).items():
                destination[prefix + name] = part

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        missing: list[str] = []
        for tensor in self._parts:
            own.pop(prefix + tensor, None)  # stored whole by an embcomp that knew no names
            whole = self._joined(tensor, own, prefix, missing, error_msgs)
            if whole is not None:
                own[prefix + tensor] = whole
        without: list[str] = []
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, without, unexpected_keys, error_msgs
        )
        if strict:
            whole_names = {prefix + tensor for tensor in self._parts}
            missing_keys += missing + [key for key in without if key not in whole_names]

    def _joined(
        self,
        tensor: str,
        own: dict[str, Tensor],
        prefix: str,
        missing: list[str],
        error_msgs: list[str],
    ) -> Tensor | None:
        """The tensor from the parts that came, which leave `own`; None when none can be used."""
        current = getattr(self, tensor).detach()
        pieces, came = [], 0
        for name, part in self.parts_of(tensor, current).items():
            found = own.pop(prefix + name, None)
            if found is None:
                missing.append(prefix + name)
            elif found.shape != part.shape:
                error_msgs.append(
                    f"size mismatch for {prefix + name}: copying a param with shape "
                    f"{found.shape} from checkpoint, the shape in current model is {part.shape}."
                )
            else:
                came += 1
                pieces.append(found)
                continue
            pieces.append(part)
        if not came or (current.is_meta and came < len(pieces)):
            return None
        return torch.cat([piece.to(pieces[0].device) for piece in pieces])


def part_name(tensor: str, part: str) -> str:
    """The name in a state dict of a tensor's part. Tables' names hold no dot."""
    return f"{tensor}@{part}"


def persistent_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each whole; nothing is filled or copied."""
    found: dict[str, Tensor] = dict(module.named_parameters())
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                found[prefix + name] = buffer
    return found


def stored_tensors(module: nn.Module, tensors: Mapping[str, Long]) -> dict[str, Long]:
    """Whole tensors of a module as its state dict has them, in parts.

    Args:
        module: the module.
        tensors: any of its `persistent_tensors`, or others in their place.
    """
    return dict(_stored(module, tensors))


def _stored(module: nn.Module, tensors: Mapping[str, Long]) -> Iterator[tuple[str, Long]]:
    for name, tensor in tensors.items():
        path, dot, local = name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(owner, NamedParts):
            for part, piece in owner.parts_of(local, tensor).items():
                yield f"{path}{dot}{part}", piece
        else:
            yield name, tensor
