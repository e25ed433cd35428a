"""What a stage left, read by range from its checkpoint: no process loads it whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from embcomp.backends.base import MethodState
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.group_states import GroupState
from embcomp.collection.groups import Group
from embcomp.errors import EmbcompError
from embcomp.layers.named_parts import persistent_tensors, stored_tensors
from embcomp.layers.row_sources import JoinedRows, RowSource
from embcomp.planning.stage_order import StagedGroup
from embcomp.training.build import UnshardedModel
from embcomp.training.checkpoint import checkpoint_folder, read_state
from embcomp.training.files.checkpoint_rows import CheckpointTensors
from embcomp.training.stages.run_context import RunContext

_SMALL = 1 << 20  # bytes of a tensor that is read whole


@dataclass(frozen=True, kw_only=True)
class LeftModel:
    """A checkpoint, and the model that it is of.

    Attributes:
        unsharded: the model, its tables on the meta device.
        folder: the checkpoint's.
        tensors: what is in it, by the names of the model.
    """

    unsharded: UnshardedModel
    folder: Path
    tensors: CheckpointTensors

    @classmethod
    def at(cls, run: RunContext, index: int, step: int) -> LeftModel:
        """A stage's weights at a step.

        Args:
            run: the run.
            index: the place of a stage that trains.
            step: a step of that stage that has a checkpoint.
        """
        unsharded = run.build(torch.device("meta"), run.plan_of(index))
        return cls.in_folder(checkpoint_folder(run.place(index).checkpoints, step), unsharded)

    @classmethod
    def in_folder(cls, folder: Path, unsharded: UnshardedModel) -> LeftModel:
        """A checkpoint of a model.

        Args:
            folder: the checkpoint's.
            unsharded: the model, its tables on the meta device.

        Raises:
            CheckpointError: it cannot be read, or is of another format.
        """
        if not folder.exists():
            raise EmbcompError(f"{folder} does not exist")
        read_state(folder)  # refuses other formats
        return cls(unsharded=unsharded, folder=folder, tensors=CheckpointTensors(folder))

    def states(self) -> list[GroupState]:
        """The form of every method of the embedding tables, long tensors to be read by range."""
        tables = self.unsharded.tables
        assert tables is not None
        return self.states_of(tables)

    def states_of(self, tables: CompressedEmbeddingBagCollection) -> list[GroupState]:
        """The same of one of the model's collections.

        Args:
            tables: embedding tables, or first-order weights.
        """
        path = path_of(self.unsharded.model, tables)
        return [self._state(group, path) for group in tables.groups]

    def state_of(self, group: StagedGroup) -> MethodState:
        """The form of the tables of a method that is trained in stages."""
        return next(
            each.form
            for each in self.states()
            if group.names[0] in [table.name for table in each.tables]
        )

    def states_beside(self, group: StagedGroup) -> list[GroupState]:
        """The forms of all tables but a method's, which others may have been stored with."""
        found = []
        for each in self.states():
            others = [table for table in each.tables if table.name not in group.names]
            if len(others) < len(each.tables):
                # Only tables that share nothing have been stored with those of another method.
                names = {f"rows.{table.name}" for table in others}
                came: dict[str, Tensor | RowSource]
                came = {**each.form.tensors, **each.form.sources}
                rows = {name: tensor for name, tensor in came.items() if name in names}
                each = GroupState(tables=others, form=MethodState.of(each.form.config, rows))
            if others:
                found.append(each)
        return found

    def _state(self, group: Group, path: str) -> GroupState:
        tensors: dict[str, Tensor | RowSource] = {}
        for table in group.backend.physical_tables:
            rows = self.tensors.rows(f"{path}.{group.rows_name(table.name)}")
            tensors[f"rows.{table.name}"] = rows.first_columns(table.embedding_dim)
        for part, module in group.modules():
            for name, tensor in persistent_tensors(module).items():
                names = [
                    f"{path}.{group.state_name(part, stored)}"
                    for stored in stored_tensors(module, {name: tensor})
                ]
                tensors[f"{part}.{name}"] = self._joined(names)
        form = MethodState.of(group.config, tensors)
        return GroupState(tables=group.tables, form=form)

    def _joined(self, names: list[str]) -> Tensor | RowSource:
        """A tensor that is stored in parts."""
        shapes = self.tensors.shapes
        small = all(
            len(shapes.get(name, ())) == 0 or torch.Size(shapes[name]).numel() * 8 <= _SMALL
            for name in names
        )
        if not small:
            return JoinedRows([self.tensors.rows(name) for name in names])
        parts = [self.tensors.tensor(name) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def outside(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor | RowSource]:
        """What is in the model and not in its embedding tables.

        Args:
            wanted: the state dict of the model that is to have it.
        """
        assert self.unsharded.tables is not None
        inside = path_of(self.unsharded.model, self.unsharded.tables) + "."
        shapes = self.tensors.shapes
        return {
            name: self._joined([name])
            for name in self.unsharded.model.state_dict()
            if name in wanted and name in shapes and not name.startswith(inside)
        }


def path_of(model: nn.Module, collection: CompressedEmbeddingBagCollection) -> str:
    """Where a collection is inside a model."""
    return next(path for path, module in model.named_modules() if module is collection)
