"""The steps and features of a collection as the compiled look-up reads them.

The fields and their order are those of the structures in `kernel.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embcomp.backends.base import Backend
from embcomp.collection.groups import Group, TableFeature
from embcomp.layers.fused_lookups import (
    CodedRow,
    FusableCombine,
    FusableRoute,
    FusedEmbedding,
    FusedRoutes,
    HashedBeyond,
    HashedRow,
    IdRoute,
    OwnRow,
    PlacedRow,
    QuotientRow,
    RankedRow,
    RemainderRow,
    RowWithin,
    side_by_side,
)
from embcomp.layers.hashing import to_signed
from embcomp.serving.serving_rows import HeldTable
from embcomp.tables.row_types import ROW_TYPES, row_bytes

_POINTERS = ("rows", "state", "counts", "columns", "projection")
STEP = np.dtype(
    [(name, "<u8") for name in _POINTERS]
    + [(name, "<i8") for name in ("row_bytes", "num_rows", "a", "b", "c", "d")]
    + [(name, "<i4") for name in ("kind", "row_type", "how", "into", "width", "out_width")]
    + [(name, "<i4") for name in ("from", "joined", "asked", "last")]
)
FEATURE = np.dtype(
    [(name, "<i8") for name in ("limit", "out")]
    + [(name, "<i4") for name in ("source", "first", "count", "dim", "mean", "zero")]
    + [("scale", "<f4"), ("linear", "<i4"), ("plain", "<i4"), ("coded", "<i4")]
)
HEADER = np.dtype(
    [(name, "<u8") for name in ("features", "steps", "places")]
    + [(name, "<i8") for name in ("num_features", "num_steps", "num_sources", "widest", "stride")]
)
_IN_CACHE = 1 << 18  # bytes of tables that a core's own cache holds, all of a collection together
_LINE = 64  # bytes of a cache line
_MOST_ASKED = 256  # bytes of a row; the processor follows what lies behind by itself
_RANKED, _CODED = 4, 5  # kinds of steps that read something beside the row
_HOW = {"set": 0, "add": 1, "multiply": 2}


@dataclass(frozen=True, kw_only=True)
class FusedProgram:
    """What the compiled look-up is given of a collection.

    Args:
        steps: every look-up of a row, feature after feature.
        features: one for each (table, feature), in the order of the groups.
        instances: those.
        widest: columns of the widest row or embedding.
        held: tensors that the steps point into.
    """

    steps: np.ndarray
    features: np.ndarray
    instances: Sequence[TableFeature]
    widest: int
    held: Sequence[Tensor]


@dataclass
class _Writer:
    far: bool  # whether rows are not all in a core's own cache, so that they are asked for ahead
    steps: list[dict[str, Any]] = field(default_factory=list)
    features: list[dict[str, Any]] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)

    def point(self, tensor: Tensor, dtype: torch.dtype) -> int:
        """The address of a tensor that stays where it is."""
        kept = tensor.detach().to("cpu", dtype).contiguous()
        self.held.append(kept)
        return kept.data_ptr()


def make_program(
    groups: Sequence[Group], stored: Mapping[str, HeldTable], sources: Sequence[str]
) -> FusedProgram:
    """The program of a collection whose methods all say what they do.

    Args:
        groups: the methods, loaded.
        stored: their physical tables.
        sources: the features that come, in order.
    """
    writer = _Writer(far=sum(table.rows.nbytes for table in stored.values()) > _IN_CACHE)
    instances: list[TableFeature] = []
    for group in groups:
        told = _told(group)
        assert told is not None, "it was asked before"
        routes, embeddings = told
        for instance, limit, embedding in zip(group.instances, routes.limits, embeddings):
            _add_feature(writer, group.backend, stored, routes, embedding)
            writer.features[-1] |= {
                "limit": -1 if limit is None else limit,
                "source": sources.index(instance.feature),
                "mean": int(instance.table.mean_pooling),
                "linear": int(not group.unpooled),
            }
            instances.append(instance)
    steps, features = _array(writer.steps, STEP), _array(writer.features, FEATURE)
    sizes = [*steps["width"], *steps["out_width"], *features["dim"], 1]
    return FusedProgram(
        steps=steps,
        features=features,
        instances=instances,
        widest=int(max(sizes)),
        held=writer.held,
    )


def _array(rows: Sequence[Mapping[str, Any]], dtype: np.dtype) -> np.ndarray:
    found = np.zeros(len(rows), dtype=dtype)
    for n, row in enumerate(rows):
        for name, value in row.items():
            found[n][name] = value
    return found


def is_fusable(groups: Sequence[Group]) -> bool:
    """Whether all methods of a collection say what they do."""
    return all(_told(group) is not None for group in groups)


def _told(group: Group) -> tuple[FusedRoutes, Sequence[FusedEmbedding]] | None:
    """What a method says of its routes and embeddings; None where it says nothing."""
    backend = group.backend
    if backend.needs_context or not isinstance(backend.route, FusableRoute):
        return None
    routes = backend.route.fused_routes()
    if routes is None:
        return None
    dims = {table.name: table.embedding_dim for table in backend.physical_tables}
    widths = [dims[table] for table in _owners(backend)]
    if isinstance(backend.combine, nn.Identity):
        wanted = [instance.table.embedding_dim for instance in group.instances]
        return routes, side_by_side(widths, wanted)
    if not isinstance(backend.combine, FusableCombine):
        return None
    embeddings = backend.combine.fused_embeddings(widths)
    return None if embeddings is None else (routes, embeddings)


def _owners(backend: Backend) -> list[str]:
    """The physical table of each key."""
    owners = {key: table.name for table in backend.physical_tables for key in table.keys}
    return [owners[key] for key in backend.keys]


def _add_feature(
    writer: _Writer,
    backend: Backend,
    stored: Mapping[str, HeldTable],
    routes: FusedRoutes,
    embedding: FusedEmbedding,
) -> None:
    owners, first = _owners(backend), len(writer.steps)
    covered = 0
    for placed in embedding.rows:
        table = stored[owners[placed.key]]
        for n, route in enumerate(routes.by_key[backend.keys[placed.key]]):
            step = _step(writer, table, placed)
            if n:
                step |= {"how": _HOW["add"], "joined": 1}
            writer.steps.append(step | _route(route, writer))
        if placed.how == "set" and placed.columns is None:
            covered += step["out_width"] or step["width"]
    skips = any(
        isinstance(route, RowWithin | HashedBeyond)
        for placed in embedding.rows
        for route in routes.by_key[backend.keys[placed.key]]
    )
    own = writer.steps[first:]
    plain = all(s["how"] == 0 and not s.get("columns") and not s.get("projection") for s in own)
    coded = all(s["kind"] == _CODED and s["c"] + 2 ** s["d"] <= s["num_rows"] for s in own)
    before = sum(feature["dim"] for feature in writer.features)
    writer.features.append(
        {
            "out": before,
            "first": first,
            "count": len(writer.steps) - first,
            "dim": embedding.width,
            "zero": int(skips or covered < embedding.width),
            "scale": embedding.scale,
            "plain": int(plain),
            "coded": int(plain and coded),
        }
    )


def _step(writer: _Writer, table: HeldTable, placed: PlacedRow) -> dict[str, Any]:
    rows = table.rows.detach().contiguous()
    writer.held.append(rows)
    asked = min(row_bytes(table.dim, table.row_type), _MOST_ASKED)
    straddles = rows.data_ptr() % _LINE != 0 or asked % _LINE != 0
    step = {
        "rows": rows.data_ptr(),
        "row_bytes": row_bytes(table.dim, table.row_type),
        "num_rows": len(rows),
        "asked": asked if writer.far else 0,
        "last": asked - 1 if writer.far and straddles else 0,
        "row_type": ROW_TYPES.index(table.row_type),
        "how": _HOW[placed.how],
        "into": placed.into,
        "width": table.dim if placed.width is None else placed.width,
        "out_width": 0,
        "from": placed.start,
    }
    if placed.columns is not None:
        step["columns"] = writer.point(placed.columns, torch.int32)
    if placed.projection is not None:
        step["projection"] = writer.point(placed.projection, torch.float32)
        step["width"], step["out_width"] = placed.projection.shape
    return step


def step_bytes(step: np.void) -> int:
    """Bytes of a row, a code or a bitmap that a step reads for an id."""
    kind = int(step["kind"])
    beside = {_RANKED: 36, _CODED: -(-int(step["d"]) // 8)}.get(kind, 0)
    return int(step["row_bytes"]) + beside


def _magic(divisor: int) -> int:
    """What the compiled code multiplies by where it would divide, as a signed number."""
    return to_signed((2**64 - 1) // divisor)


@singledispatch
def _route(route: IdRoute, writer: _Writer) -> dict[str, Any]:
    """The fields of a step that say which row an id has."""
    raise NotImplementedError(type(route).__name__)


@_route.register
def _(route: OwnRow, writer: _Writer) -> dict[str, Any]:
    return {"kind": 0}


@_route.register
def _(route: HashedRow, writer: _Writer) -> dict[str, Any]:
    return {"kind": 1, "a": route.salt, "b": route.num_rows, "c": _magic(route.num_rows)}


@_route.register
def _(route: HashedBeyond, writer: _Writer) -> dict[str, Any]:
    own = {"a": route.salt, "b": route.num_rows, "c": _magic(route.num_rows), "d": route.first}
    return {"kind": 7} | own


@_route.register
def _(route: QuotientRow, writer: _Writer) -> dict[str, Any]:
    return {"kind": 2, "a": route.divisor, "c": _magic(route.divisor)}


@_route.register
def _(route: RemainderRow, writer: _Writer) -> dict[str, Any]:
    own = {"a": route.divisor, "b": route.first, "c": _magic(route.divisor)}
    return {"kind": 3} | own


@_route.register
def _(route: RankedRow, writer: _Writer) -> dict[str, Any]:
    words, counts = writer.point(route.words, torch.int64), writer.point(route.counts, torch.int32)
    return {
        "kind": _RANKED,
        "state": words,
        "counts": counts,
        "a": route.first_block,
        "b": route.shared,
    }


@_route.register
def _(route: CodedRow, writer: _Writer) -> dict[str, Any]:
    codes = writer.point(route.codes, torch.uint8)
    own = {"a": route.step, "b": route.start, "c": route.first, "d": route.bits}
    return {"kind": _CODED, "state": codes} | own


@_route.register
def _(route: RowWithin, writer: _Writer) -> dict[str, Any]:
    return {"kind": 6, "a": route.low, "b": route.high}
