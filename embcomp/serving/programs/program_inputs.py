"""Checking what a program is given, and what it refused, before a runtime says it in its own words."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from embcomp.backends.full import RangeCheck
from embcomp.errors import DataError
from embcomp.serving.artefact_config import ProgramRecord
from embcomp.serving.exported_program import Program, RectangleTables

_SHAPE = re.compile(r"\((?P<sizes>[^)]*)\) (?P<dtype>\w+)")


def id_limits(program: Program) -> dict[str, int]:
    """The ids `[0, limit)` that each feature may have, where some method refuses others."""
    limits: dict[str, int] = {}
    for tables in program.modules():
        if not isinstance(tables, RectangleTables):
            continue
        for group, route in zip(tables.single.groups, tables.single.routes):
            for check in route.modules():
                if isinstance(check, RangeCheck):
                    for instance, limit in zip(group.instances, check.limits):
                        known = limits.get(instance.feature, limit)
                        limits[instance.feature] = min(known, limit)
    return limits


def words_of(program: Program) -> dict[str, str]:
    """What a program's file says of its features: their names, and the ids that they take (-1: any)."""
    limits = id_limits(program)
    return {
        "feature_names": "\t".join(program.feature_names),
        "limits": " ".join(str(limits.get(name, -1)) for name in program.feature_names),
    }


def check_inputs(record: ProgramRecord, inputs: Mapping[str, Tensor]) -> None:
    """Raise a DataError unless a program's inputs have the names, types and shapes that it takes.

    Args:
        record: what it takes.
        inputs: what it is given.
    """
    if not isinstance(inputs, Mapping) or set(inputs) != set(record.inputs):
        came = ", ".join(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise DataError(
            f"the program takes {', '.join(record.inputs)}; it was given {came or 'nothing'}"
        )
    batch: dict[str, int] = {}
    for name, told in record.inputs.items():
        found = _SHAPE.match(told)
        assert found is not None, told
        wanted, sizes = found["dtype"], [size.strip() for size in found["sizes"].split(",")]
        given = inputs[name]
        kind = str(given.dtype).removeprefix("torch.") if isinstance(given, Tensor) else ""
        fits = kind == wanted and given.dim() == len(sizes)
        fits = fits and all(
            not size.isdigit() or own == int(size) for size, own in zip(sizes, given.shape)
        )
        if not fits:
            shape = tuple(given.shape) if isinstance(given, Tensor) else ""
            raise DataError(
                f"the program takes {name} as {found[0]}; it was given "
                f"{shape} {kind or type(given).__name__}"
            )
        batch[name] = given.shape[0]
    if len(set(batch.values())) > 1:
        told = ", ".join(f"{name} {rows}" for name, rows in batch.items())
        raise DataError(f"the program's inputs differ in their batch size: {told}")


def refused_ids(limits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Which ids are not `[0, limit)` where their feature has a limit: bool, of the shape of `ids`.

    Args:
        limits: (F,) int64, -1 for features that take any id.
        inputs: `ids`, and `lengths` with bags.
    """
    ids = inputs["ids"]
    if "lengths" in inputs:
        limits = limits.unsqueeze(1)
    refused = (limits >= 0) & ((ids < 0) | (ids >= limits))
    if "lengths" in inputs:
        slots = torch.arange(ids.shape[2], device=ids.device)
        refused = refused & (slots < inputs["lengths"].unsqueeze(2))
    return refused


def check_ids(words: Mapping[str, str], inputs: Mapping[str, Tensor]) -> None:
    """Raise a DataError that names an id out of range, if there is one.

    Args:
        words: as `words_of` wrote them.
        inputs: what the program is given.
    """
    limits = torch.tensor([int(limit) for limit in words["limits"].split()])
    refused = refused_ids(limits, inputs)
    if bool(refused.any()):
        row, place, *_ = refused.nonzero()[0].tolist()
        id_ = int(inputs["ids"][row, place][refused[row, place]].view(-1)[0])
        name = words["feature_names"].split("\t")[place]
        raise DataError(
            f"feature {name!r}: id {id_} is not in [0, {int(limits[place])}), in row {row} of the batch"
        )
