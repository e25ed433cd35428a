"""Which tensors of a program lie in an artefact's files as they are, so that a program need not hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from embcomp.io.tensor_files import StoredTensor
from embcomp.layers.named_parts import NamedParts, persistent_tensors
from embcomp.serving.artefact_folder import find_tensors
from embcomp.serving.exported_program import Program, RectangleTables
from embcomp.serving.id_lookup import SingleIds


def shared_tensors(program: Program, folder: Path) -> dict[str, StoredTensor]:
    """The program's parameters and buffers that are one piece of a file, by their names in the program.

    Rows are stored under one name each. What a method learnt of several tables is stored table by
    table, and is one piece where the tables' parts lie one behind the other.

    Args:
        program: made of the artefact.
        folder: the artefact's.
    """
    stored = find_tensors(folder)
    found: dict[str, StoredTensor] = {}
    for name, parts in _stored_names(program):
        piece = _one_piece([stored[part] for part in parts if part in stored])
        if piece is not None and len(parts) == sum(part in stored for part in parts):
            found[name] = piece
    return found


def _stored_names(program: Program) -> Iterator[tuple[str, Sequence[str]]]:
    """Names in the program, and those that the artefact has for the same tensor's parts."""
    tables: dict[str, RectangleTables] = {
        path: part for path, part in program.named_modules() if isinstance(part, RectangleTables)
    }
    for path, part in tables.items():
        role = "first_order" if path.endswith("first_order_tables") else "tables"
        for own, parts in _of_tables(part.single).items():
            yield f"{path}.single.{own}", [f"{role}.{name}" for name in parts]
    if program.network is not None:
        for name in persistent_tensors(program.network):
            if not any(f"network.{name}".startswith(f"{path}.") for path in tables):
                yield f"network.{name}", [f"network.{name}"]


def _of_tables(single: SingleIds) -> dict[str, list[str]]:
    """The same of a collection, by the names in its part of the artefact."""
    found: dict[str, list[str]] = {}
    for child, held in (("rows", single.rows), ("unpooled_rows", single.unpooled_rows)):
        if held is not None:
            for table, buffer in held.buffer_names.items():
                found[f"{child}.{buffer}"] = [f"rows.{table}"]
    for index, group in enumerate(single.groups):
        for part, module in group.modules():
            for name, parts in _module_parts(module).items():
                found[f"{part}s.{index}.{name}"] = [f"{part}.{group.label}.{own}" for own in parts]
    return found


def _module_parts(module: nn.Module) -> Mapping[str, Sequence[str]]:
    """Names of a module's tensors, and the names that their parts are stored under."""
    found = {}
    for name in persistent_tensors(module):
        path, dot, local = name.rpartition(".")
        owner = module.get_submodule(path)
        names = owner.names_of(local) if isinstance(owner, NamedParts) else [local]
        found[name] = [f"{path}{dot}{each}" for each in names]
    return found


def _one_piece(parts: Sequence[StoredTensor]) -> StoredTensor | None:
    """The parts as one tensor along their first axis, if they lie one behind the other."""
    if not parts:
        return None
    whole = parts[0]
    for part in parts[1:]:
        follows = part.file == whole.file and part.start == whole.start + whole.nbytes
        if not follows or part.dtype != whole.dtype or part.shape[1:] != whole.shape[1:]:
            return None
        whole = replace(whole, shape=(whole.shape[0] + part.shape[0], *whole.shape[1:]))
    return whole
