"""The tensors of a collection as an artefact stores them, made block by block from its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from embcomp.collection.collection import CompressedEmbeddingCollection
from embcomp.collection.group_states import GroupState
from embcomp.collection.groups import Group
from embcomp.collection.plan import ResolvedPlan
from embcomp.collection.table_row_types import RowTypes
from embcomp.errors import ArtefactError
from embcomp.io.tensor_writing import NewTensor
from embcomp.layers.block_work import row_blocks
from embcomp.layers.learned_buffers import fill_buffers
from embcomp.layers.named_parts import persistent_tensors, stored_tensors
from embcomp.layers.row_sources import RowSource
from embcomp.serving.artefact_config import TablesRecord
from embcomp.tables.footprint import Footprint
from embcomp.tables.row_types import (
    RowType,
    largest_error,
    pack,
    served_footprint,
    stored_dtype,
    stored_shape,
)

_CHUNK = 1 << 22  # elements that are looked at together


class ServingForms(Protocol):
    """A collection whose methods are in their serving forms."""

    @property
    def plan(self) -> ResolvedPlan:
        """The method of every table."""

    @property
    def groups(self) -> list[Group]:
        """The methods as built."""

    @property
    def footprint(self) -> Footprint:
        """Its bytes."""

    def states(self) -> list[GroupState]:
        """Every method with its tables and tensors."""


@dataclass(frozen=True, kw_only=True)
class ArtefactPart:
    """A collection's serving forms, to be written.

    Attributes:
        record: how the artefact describes them.
        tensors: what is to be written, by their names in the part.
        row_error: the largest error of a weight in each physical table whose rows are not float32,
            once they are written.
    """

    record: TablesRecord
    tensors: list[NewTensor]
    row_error: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, compacted: ServingForms, wanted: RowTypes, role: str) -> ArtefactPart:
        """Describe a collection.

        Args:
            compacted: its methods are serving forms.
            wanted: how rows are to be stored.
            role: what the part is called: `tables` or `first_order`.
        """
        types: dict[str, RowType] = {}
        tensors: list[NewTensor] = []
        errors: dict[str, float] = {}
        for each, group in zip(compacted.states(), compacted.groups):
            own = wanted.of_physical(group.tables, group.backend.physical_tables)
            types |= own
            for name, row_type in own.items():
                full = f"{role}.rows.{name}"
                tensors.append(_stored_rows(full, name, each.form.rows(name), row_type, errors))
            for name, tensor in _learned(each, group).items():
                tensors.append(_new_tensor(f"{role}.{name}", tensor))
        record = TablesRecord.of(
            compacted.plan,
            types,
            kind="unpooled" if isinstance(compacted, CompressedEmbeddingCollection) else "pooled",
            is_weighted=getattr(compacted, "is_weighted", bool)(),
            need_indices=getattr(compacted, "need_indices", bool)(),
            size=served_footprint(compacted.footprint, types).serve_bytes,
        )
        measured = sum(tensor.nbytes for tensor in tensors)
        assert measured == record.bytes, (
            f"{role} take {measured} bytes in the file, {record.bytes} were predicted"
        )
        return cls(record=record, tensors=tensors, row_error=errors)


def _learned(each: GroupState, group: Group) -> dict[str, Tensor | RowSource]:
    """What a method stores beside its rows, by the names in its part."""
    found: dict[str, Tensor | RowSource] = {}
    for part, module in group.modules():
        whole: dict[str, Tensor | RowSource] = {}
        for name, own in persistent_tensors(module).items():
            key = f"{part}.{name}"
            held = each.form.sources.get(key, each.form.tensors.get(key))
            if held is None:
                fill_buffers(module)  # what the config implies
                held = own
            whole[name] = held
        for name, tensor in stored_tensors(module, whole).items():
            found[f"{part}.{group.label}.{name}"] = tensor
    return found


def _stored_rows(
    name: str, table: str, rows: RowSource, row_type: RowType, errors: dict[str, float]
) -> NewTensor:
    """A physical table's rows in the type that they are stored in."""

    def blocks() -> Iterator[Tensor]:
        if row_type != "fp32":
            errors[table] = 0.0
        for block in row_blocks(table, len(rows), rows.shape[1]):
            own = rows.read(block.start, block.stop).detach().cpu()
            stored = pack(own, row_type)
            check_finite(name, stored)
            if row_type != "fp32":
                errors[table] = max(errors[table], largest_error(own, stored, row_type))
            yield stored

    shape = stored_shape(len(rows), rows.shape[1], row_type)
    return NewTensor(name=name, shape=shape, dtype=stored_dtype(row_type), blocks=blocks)


def _new_tensor(name: str, tensor: Tensor | RowSource) -> NewTensor:
    def blocks() -> Iterator[Tensor]:
        if isinstance(tensor, Tensor):
            own = tensor.detach().cpu().contiguous()
            check_finite(name, own)
            yield own
            return
        for block in row_blocks(name, len(tensor), max(1, tensor.row_bytes // 4)):
            part = tensor.read(block.start, block.stop)
            check_finite(name, part)
            yield part

    return NewTensor(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, blocks=blocks)


def network_tensors(tensors: Mapping[str, Tensor]) -> list[NewTensor]:
    """A network's tensors, by their names in the model."""
    return [_new_tensor(f"network.{name}", tensor) for name, tensor in tensors.items()]


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise an ArtefactError for a tensor that holds NaN or an infinity."""
    if not tensor.is_floating_point():
        return
    for part in tensor.reshape(-1).split(_CHUNK):
        if not bool(torch.isfinite(part).all()):
            raise ArtefactError(
                f"the tensor {name} holds NaN or infinities, so that nothing was written; look for "
                "the step at which training diverged, and save weights from before it"
            )
