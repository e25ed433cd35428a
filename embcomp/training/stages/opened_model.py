"""A run's trained network around tables whose rows stay in its checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.groups import Group
from embcomp.collection.sourced import SourcedTables
from embcomp.errors import CheckpointError
from embcomp.layers.block_work import BLOCK_BYTES
from embcomp.layers.named_parts import persistent_tensors
from embcomp.layers.row_sources import RowSource
from embcomp.tables.specs import PhysicalTable
from embcomp.training.checkpoint import open_whole
from embcomp.training.files.checkpoint_rows import CheckpointTensors
from embcomp.training.stages.loading import best_checkpoint
from embcomp.training.stages.run_context import RunContext


def open_trained(run: RunContext) -> nn.Module:
    """The network of a run's best weights around tables whose rows stay in the checkpoint.

    Args:
        run: a run that has a checkpoint.
    """
    stored = open_whole(best_checkpoint(run))
    unsharded = run.build(torch.device("meta"), run.plan_of(run.latest_stage()))
    model = unsharded.model
    for name, collection in (
        ("tables", unsharded.tables),
        ("first_order_tables", unsharded.first_order),
    ):
        if collection is not None:
            model.add_module(name, _in_checkpoint(collection, stored, f"{name}."))
    with torch.no_grad():
        for name, tensor in persistent_tensors(model).items():
            if not name.startswith(("tables.", "first_order_tables.")):
                _same_shape(stored, name, tuple(tensor.shape))
                tensor.copy_(stored.tensor(name))
    return model.eval()


def _in_checkpoint(
    collection: CompressedEmbeddingBagCollection, stored: CheckpointTensors, prefix: str
) -> SourcedTables:
    """The tables of a collection without rows, theirs read from a checkpoint."""

    def rows(group: Group, table: PhysicalTable) -> RowSource:
        found = stored.rows(prefix + group.rows_name(table.name))
        if len(found) != table.num_embeddings or found.shape[1] < table.embedding_dim:
            raise _other_model(prefix + table.name, found.shape)
        return found.first_columns(table.embedding_dim)

    def fill(group: Group, part: str, name: str, own: Tensor) -> None:
        full = prefix + group.state_name(part, name)
        _same_shape(stored, full, tuple(own.shape))
        if own.dim() not in (1, 2):
            own.copy_(stored.tensor(full))
            return
        source = stored.rows(full)
        step = max(1, BLOCK_BYTES // max(1, source.row_bytes))
        for start in range(0, len(own), step):
            own[start : start + step] = source.read(start, min(start + step, len(own)))

    configs = collection.embedding_bag_configs()
    return SourcedTables.read(configs, collection.plan, rows=rows, fill=fill)


def _same_shape(stored: CheckpointTensors, name: str, shape: tuple[int, ...]) -> None:
    if name in stored.shapes and stored.shapes[name] != shape:
        raise _other_model(name, stored.shapes[name])


def _other_model(name: str, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's {name} has the shape {shape}, so it is another model's; restore the run's "
        "config.yaml and dataset"
    )
