"""From a config and a dataset to a sharded model with initial weights.

What comes out depends on the config alone, not on the number of ranks: dense weights follow the
seed, rows are drawn by `initial_rows`, and the placement never changes which optimizer acts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.distributed.model_parallel import DistributedModelParallel

from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.plan import ResolvedPlan
from embcomp.collection.sharded_codes import shard_codes
from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.loader.batch import Batch
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError
from embcomp.layers.learned_buffers import AddPenalty
from embcomp.layers.row_sources import RowSource
from embcomp.models.base import ModelInputs
from embcomp.planning.config_plan import first_order_plan, main_plan, sizes_of, table_configs
from embcomp.tables.specs import PhysicalTable, padded_dim
from embcomp.training.distributed.batch_weights import of_mean_one
from embcomp.training.distributed.process import Process
from embcomp.training.distributed.sharding_plan import make_sharder, plan_sharding
from embcomp.training.optim.initial_rows import (
    InitFn,
    InitialRows,
    fill_function,
    initialize_rows,
)
from embcomp.training.optim.optimizers import attach_fused_optimizer, check_packed_rows
from embcomp.training.optim.precision import Precision, check_bf16

TASK_PREFIX = "model."
"""What `TrainTask` puts before the names of its model's tensors."""


class BatchLoss(nn.Module):
    """Mean binary cross-entropy of a batch's real rows, and what methods add to it.

    Where rows have weights it is the weighted mean over the batches of all ranks together.

    Attributes:
        scale: factor that the loop sets for a step whose ranks do not hold whole batches.

    Args:
        model: the network whose methods may add a penalty.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scale = 1.0
        self.add_penalty = AddPenalty(model)

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of (B,) logits."""
        losses = functional.binary_cross_entropy_with_logits(
            logits.float(), batch.labels, reduction="none"
        )
        if batch.weights is not None:
            # Of an evaluation's loss nothing is used, so that no rank waits for it.
            losses = losses * of_mean_one(batch.weights, batch.num_valid, over_ranks=self.training)
        loss = losses.mean() if batch.num_valid is None else _masked_mean(losses, batch.num_valid)
        return self.add_penalty(loss if self.scale == 1.0 else loss * self.scale)


def _masked_mean(losses: Tensor, num_valid: int) -> Tensor:
    """Padded rows keep their place in the graph, with no weight."""
    valid = torch.arange(len(losses), device=losses.device) < num_valid
    return torch.where(valid, losses, 0.0).sum() / len(losses)


class TrainTask(nn.Module):
    """A model and its loss as one module, the shape that TorchRec's train pipelines want.

    `forward` is traced by them, so it does nothing but call children.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = BatchLoss(model)

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss () to differentiate, and as output the loss's value () and the logits (B,)."""
        logits = self.model(batch.dense, batch.sparse)
        loss = self.loss(logits, batch)
        return loss, (loss.detach(), logits)


@dataclass(frozen=True)
class UnshardedModel:
    """A model before sharding, its tables on the meta device.

    Attributes:
        model: the network.
        tables: the collection inside it, if the model uses embeddings.
        first_order: the collection of first-order weights inside it, if it uses them.
        mean_lengths: mean number of values of each categorical feature.
    """

    model: nn.Module
    tables: CompressedEmbeddingBagCollection | None
    first_order: CompressedEmbeddingBagCollection | None
    mean_lengths: Mapping[str, float]

    def collections(self) -> Iterator[CompressedEmbeddingBagCollection]:
        """The collections that there are."""
        for collection in (self.tables, self.first_order):
            if collection is not None:
                yield collection


def build_model(
    config: TrainConfig,
    info: DatasetInfo,
    table_device: torch.device,
    plan: ResolvedPlan | None = None,
    first_order: ResolvedPlan | None = None,
) -> UnshardedModel:
    """The network around its tables; dense weights follow the seed.

    Args:
        config: the run.
        info: the dataset's features.
        table_device: where rows are allocated; `meta` allocates none.
        plan: the forms of the embedding tables in a stage of the run; as in the config by default.
        first_order: the form of the first-order weights; as in the config by default.
    """
    if not info.categorical:
        raise ConfigError(f"dataset {info.name!r} has no categorical feature, so nothing to embed")
    settings, sizes = config.model.settings, sizes_of(info)
    main = linear = None
    if settings.uses_embeddings:
        plan = plan or main_plan(config, sizes)
        main = CompressedEmbeddingBagCollection(
            table_configs(config, sizes), plan, device=table_device
        )
    if settings.uses_first_order:
        first_order = first_order or first_order_plan(config, sizes)
        linear = CompressedEmbeddingBagCollection(
            table_configs(config, sizes, embedding_dim=1), first_order, device=table_device
        )
    torch.manual_seed(config.seed)
    model = settings.build(model_inputs(config, info), main, linear)
    lengths = {feature.name: feature.mean_length for feature in info.categorical}
    return UnshardedModel(model, main, linear, lengths)


def model_inputs(config: TrainConfig, info: DatasetInfo) -> ModelInputs:
    """What the run's model is told of the data and the tables."""
    return ModelInputs(
        feature_names=tuple(info.categorical_names),
        embedding_dim=config.tables.embedding_dim,
        num_dense=len(info.numeric),
        pooling=config.tables.pooling,
    )


def shard_model(
    unsharded: UnshardedModel, config: TrainConfig, process: Process
) -> DistributedModelParallel:
    """Spread a model whose tables are on the meta device over the ranks and draw its rows."""
    rows, train = config.train.row_optimizer, config.train
    fused = rows.mode == "fused" and train.sharding != "data_parallel"
    check_packed_rows(unsharded.model, rows, fused=fused)
    if fused:
        attach_fused_optimizer(unsharded.model, rows, process.device)
    sharder = make_sharder(rows.max_gradient)
    task = TrainTask(unsharded.model)
    plan = plan_sharding(
        task,
        sharder,
        process,
        "data_parallel" if rows.mode == "dense" else train.sharding,
        -(-config.data.batch_size // process.world_size),
        rows.name,
        unsharded.mean_lengths,
        train.shard_codes_above,
    )
    if fused:  # else every rank holds all tables
        shard_codes(task, above=train.shard_codes_above)
    sharded = DistributedModelParallel(task, device=process.device, plan=plan, sharders=[sharder])
    draw_rows(sharded.state_dict(), unsharded, config)
    return sharded


def loss_of(sharded: DistributedModelParallel) -> BatchLoss:
    """The loss inside a sharded `TrainTask`."""
    task = sharded.module
    assert isinstance(task, TrainTask)
    return task.loss


def check_precision(config: TrainConfig, process: Process) -> Precision:
    """The config's precision, if this device has it."""
    reduced = config.train.precision == "bf16"
    if reduced:
        check_bf16(process.device)
    return Precision(reduced, process.device)


def draw_rows(state: Mapping[str, Any], unsharded: UnshardedModel, config: TrainConfig) -> None:
    """Draw the initial rows of a model, whole or sharded.

    Args:
        state: tensors by their names in a `TrainTask`.
        unsharded: the model that they belong to.
        config: the run, whose seed the rows follow.
    """
    physical = physical_rows(unsharded, config)
    drawn = 0
    for name, weight in state.items():
        found = physical.get(name.removeprefix(TASK_PREFIX))
        if found is not None:
            drawn += 1
            table, init_fn = found
            initialize_rows(
                weight, init_fn, seed=config.seed, name=name, used_columns=table.embedding_dim
            )
    assert 2 * drawn == len(physical), "every physical table is found in the state"


def physical_rows(
    unsharded: UnshardedModel, config: TrainConfig
) -> dict[str, tuple[PhysicalTable, InitFn]]:
    """Every physical table and what draws its rows, by the names that its weight may have."""
    init = config.tables.init
    chosen = None if init.scale is None else fill_function(init.name, init.scale)
    return {
        f"{path}.{inner}.embedding_bags.{table.name}.weight": (
            table,
            table.init_fn if chosen is None else table.drawn_by(chosen),
        )
        for path, module in unsharded.model.named_modules()
        if isinstance(module, CompressedEmbeddingBagCollection)
        for table in module.physical_tables
        for inner in ("rows", "unpooled_rows")
    }


def initial_rows(name: str, unsharded: UnshardedModel, config: TrainConfig) -> RowSource:
    """The rows of a physical table before the first step, drawn whenever they are read.

    Args:
        name: of the table's weight in the model.
        unsharded: the model.
        config: the run, whose seed the rows follow.
    """
    table, init_fn = physical_rows(unsharded, config)[name]
    return InitialRows(
        table.num_embeddings,
        padded_dim(table.embedding_dim),
        init_fn,
        seed=config.seed,
        name=TASK_PREFIX + name,
        used_columns=table.embedding_dim,
    ).first_columns(table.embedding_dim)
