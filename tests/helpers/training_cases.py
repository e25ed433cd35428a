"""A toy run, and the same training written with plain torch on whole tables."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional
from torchrec.optim import RowWiseAdagrad

from embcomp.config.train_config import TrainConfig, parse_config
from embcomp.data_pipelines.loader.parquet_loader import ParquetLoader
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.training import load_model, train
from embcomp.training.build import build_model
from embcomp.training.checkpoint import model_state
from embcomp.training.distributed.process import Process, process_group
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.loop import Training
from embcomp.training.reporting.console import RunConsole
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.run_context import RunContext
from tests.helpers.plain_rmsprop import PlainRmspropAr


def write_dataset(folder: Path, weights: Sequence[float] = ()) -> Path:
    # 301 rows: the last step of an epoch is short, and on two ranks one of them holds a padded row.
    write_toy_dataset(folder, rows=(301, 75, 75), multi_valued=["C3"], group="C2", weights=weights)
    return folder


def write_recipe_dataset(folder: Path) -> Path:
    """With values enough for every shipped recipe's budget."""
    write_toy_dataset(
        folder, rows=(2048, 128, 128), num_values=(2000, 500, 50), multi_valued=["C2"]
    )
    return folder


def toy_config(dataset: Path, *overrides: str) -> TrainConfig:
    document = {
        "name": "toy",
        "seed": 3,
        "data": {"path": str(dataset), "batch_size": 32, "eval_batch_size": 32},
        "tables": {"embedding_dim": 8, "method": "full"},
        "model": {"name": "deepfm", "hidden_units": [8], "batch_norm": False},
        "train": {"epochs": 1, "log_every": 3},
    }
    return parse_config(document, overrides)


def unstarted(config: TrainConfig, folder: Path = Path("unused")) -> RunContext:
    """A run before its first step."""
    return RunContext.of(config, DatasetInfo.load(config.data.path), RunFolder(folder))


def first_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Whole weights before the first step; for one process."""
    with quiet_libraries(), process_group("cpu") as process:
        state = model_state(first_stage(config, process).sharded)
        return {key: whole(value).clone() for key, value in state.items()}


def first_stage(config: TrainConfig, process: Process) -> Training:
    """A run's first stage before its first step; its folder is gone when this returns."""
    console = RunConsole(enabled=False, name=config.name)
    with tempfile.TemporaryDirectory() as path:
        training = Training(unstarted(config, Path(path)), 0, process, console, log_sizes={})
        training.logs.close()
        return training


def whole(value) -> torch.Tensor:
    return value.local_shards()[0].tensor if hasattr(value, "local_shards") else value


def train_and_load(config: TrainConfig, runs: Path) -> dict[str, torch.Tensor]:
    """Weights after a run whose only evaluation is at its end."""
    train(config, runs=runs, quiet=True)
    return load_model(runs / config.name).state_dict()


def train_on_ranks(config: TrainConfig, runs: Path) -> None:
    """For a pool of workers: every rank's part of a run."""
    train(config, runs=runs, quiet=True)


def train_with_plain_torch(config: TrainConfig, world_size: int) -> dict[str, torch.Tensor]:
    """The same run without TorchRec's sharding and fused kernels, decay and L2 on whole tables."""
    info = DatasetInfo.load(config.data.path)
    model = build_model(config, info, torch.device("cpu")).model
    model.load_state_dict(first_weights(config))
    named = dict(model.named_parameters())
    rows = [weight for name, weight in named.items() if ".embedding_bags." in name]
    dense = [weight for name, weight in named.items() if ".embedding_bags." not in name]
    options = config.train.row_optimizer
    rate = options.learning_rate
    row_optimizer = {
        "sgd": lambda: torch.optim.SGD(rows, rate),
        "adagrad": lambda: torch.optim.Adagrad(rows, rate, eps=options.eps),
        "rowwise_adagrad": lambda: RowWiseAdagrad(rows, rate, eps=options.eps),
        "rowwise_rmsprop_ar": lambda: PlainRmspropAr(rows, options),
        "adam": lambda: torch.optim.Adam(rows, rate, eps=options.eps),
    }[options.name]()
    dense_optimizer = torch.optim.Adam(dense, config.train.dense_optimizer.learning_rate)
    loaders = [
        ParquetLoader(
            info,
            "train",
            batch_size=config.data.batch_size // world_size,
            rank=rank,
            world_size=world_size,
            shuffle=True,
            seed=config.seed,
            drop_last=False,
        )
        for rank in range(world_size)
    ]
    step = 0
    for epoch in range(config.train.epochs):
        for loader in loaders:
            loader.set_epoch(epoch)
        for batches in zip(*loaders):
            warmup = min(1.0, (step + 1) / (config.train.warmup_steps or 1))
            row_optimizer.param_groups[0]["lr"] = warmup * rate
            dense_rate = config.train.dense_optimizer.learning_rate
            dense_optimizer.param_groups[0]["lr"] = warmup * dense_rate
            with torch.no_grad():
                for weight in rows:
                    weight.mul_(1 - warmup * rate * options.weight_decay)
            losses, weights = [], []
            for batch in batches:
                real = slice(batch.num_valid)
                logits = model(batch.dense, batch.sparse)[real]
                losses.append(
                    functional.binary_cross_entropy_with_logits(
                        logits, batch.labels[real], reduction="none"
                    )
                )
                ones = torch.ones_like(batch.labels)
                weights.append((ones if batch.weights is None else batch.weights)[real])
            loss = (torch.cat(losses) * torch.cat(weights)).sum() / torch.cat(weights).sum()
            loss = loss + 0.5 * options.l2 * sum((weight**2).sum() for weight in rows)
            model.zero_grad()
            loss.backward()
            if config.train.clip_norm is not None:
                clipped = rows + dense if options.mode == "dense" else dense
                torch.nn.utils.clip_grad_norm_(clipped, config.train.clip_norm)
            row_optimizer.step()
            dense_optimizer.step()
            step += 1
    return model.state_dict()
