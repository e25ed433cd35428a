"""Each rank's share of a split, as the config cuts it into batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from rich.console import Console
from torch import nn

from embcomp.config.train_config import TrainConfig, is_loss
from embcomp.data_pipelines.integrity import (
    check_digests,
    check_labels,
    check_quickly,
    has_checksums,
    without_checksums,
)
from embcomp.data_pipelines.loader.batch import Batch
from embcomp.data_pipelines.loader.parquet_loader import DEFAULT_SHUFFLE_BUFFER, ParquetLoader
from embcomp.data_pipelines.preparing.progress import phase
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError, DataError
from embcomp.training.distributed.process import Process, launched_by_torchrun

SEARCH = "search"
"""The name of the search-validation rows, which are cut from the end of the train split."""
_FAR = 1e3  # inputs beyond this make a network overflow; transforms leave them within a few units


def check_splits(info: DatasetInfo) -> None:
    """Raise before training when there would be nothing to choose the best weights by."""
    for split in ("train", "valid"):
        if not has_rows(info, split):
            raise DataError(
                f"dataset {info.name!r} has no rows in its {split} split, which training needs; "
                "prepare it with other shares (--split random --shares 0.8,0.1,0.1), or give files "
                f"with --{split}"
            )
    if info.split("train").weight == 0:
        raise DataError(
            f"all rows of the train split of dataset {info.name!r} have the weight 0, so that there is "
            "nothing to learn from; prepare it with other weights, or without"
        )


def check_dataset(info: DatasetInfo, splits: Sequence[str], *, verify: bool, show: bool) -> None:
    """Raise unless a dataset is as it was written, as far as that is quick to see, or in full.

    One that has no checksums is taken, with a line on stderr. Ranks share the files; it is called before they join.

    Args:
        info: the dataset.
        splits: whose labels are counted.
        verify: whether every byte is read and compared with its checksum.
        show: whether the first rank shows how far that is.
    """
    check_quickly(info)
    rank, world_size = _place()
    if rank == 0 and not has_checksums(info):
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            without_checksums(info), markup=False
        )
    check_labels(info, splits, rank=rank, world_size=world_size)
    if not verify:
        return
    if not has_checksums(info):
        raise DataError(f"{without_checksums(info)}, or leave out --verify")
    total = sum(record.bytes for record in info.checksums.values()) // world_size
    with phase("verify", total, show=show and rank == 0) as advance:
        check_digests(info, rank=rank, world_size=world_size, advance=advance)


def _place() -> tuple[int, int]:
    """This process's rank and the number of ranks, which may not have joined yet."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if launched_by_torchrun():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def check_monitor(config: TrainConfig, info: DatasetInfo) -> None:
    """Raise before training when the monitored metric cannot exist on the validation split."""
    train, valid = config.train, info.split("valid")
    if train.monitor.startswith("weighted_") and info.weight is None:
        raise ConfigError(
            f"train.monitor: {train.monitor} needs weights, and rows of dataset {info.name!r} have "
            f"none; prepare it with --weight, or monitor {train.monitor.removeprefix('weighted_')}"
        )
    if train.monitor.endswith("gauc") and info.group is None:
        raise ConfigError(
            f"train.monitor: {train.monitor} needs groups, and dataset {info.name!r} names none; prepare it "
            "with --group, or monitor auc or log_loss"
        )
    watching = [key for key in ("early_stop", "plateau") if getattr(train, key) is not None]
    if watching and not is_loss(train.monitor) and valid.positives in (0, valid.rows):
        raise ConfigError(
            f"train.{watching[0]}: it watches {train.monitor}, which does not exist on the "
            f"validation split of {info.name!r}: all of its {valid.rows} labels are "
            f"{int(valid.positives > 0)}. Set train.monitor: log_loss, leave "
            f"{' and '.join(watching)} out, or prepare the dataset with another split"
        )


def has_rows(info: DatasetInfo, split: str) -> bool:
    """Whether a split is there and not empty."""
    return split in info.splits and info.splits[split].rows > 0


def training_batches(
    config: TrainConfig, info: DatasetInfo, process: Process, *, holds_out: bool = False
) -> ParquetLoader:
    """This rank's share of the training split.

    Args:
        config: the run.
        info: its dataset.
        process: the process group.
        holds_out: whether the search-validation rows are left out.
    """
    data = config.data
    return ParquetLoader(
        info,
        "train",
        part=(0.0, 1 - data.search_share) if holds_out else (0.0, 1.0),
        batch_size=_rows_per_rank("data.batch_size", data.batch_size, process),
        rank=process.rank,
        world_size=process.world_size,
        shuffle=data.shuffle,
        seed=config.seed,
        drop_last=data.drop_last,
        shuffle_buffer=data.shuffle_buffer or DEFAULT_SHUFFLE_BUFFER,
        pin_memory=process.device.type == "cuda",
    )


def search_batches(config: TrainConfig, info: DatasetInfo, process: Process) -> ParquetLoader:
    """This rank's share of the search-validation rows in whole batches, shuffled in each epoch.

    Where there are fewer rows than a batch has, each batch is all of them.
    """
    data = config.data
    train = info.split("train").rows
    rows = train - round((1 - data.search_share) * train)
    if rows < process.world_size:
        raise ConfigError(
            f"data.search_share: {data.search_share} of {train} training rows leave {rows} "
            "search-validation rows, too few to learn from; raise it"
        )
    return ParquetLoader(
        info,
        "train",
        part=(1 - data.search_share, 1.0),
        batch_size=_rows_per_rank("data.batch_size", data.batch_size, process),
        rank=process.rank,
        world_size=process.world_size,
        shuffle=True,
        seed=config.seed + 1,
        drop_last=rows >= data.batch_size,
        shuffle_buffer=data.shuffle_buffer or DEFAULT_SHUFFLE_BUFFER,
        pin_memory=process.device.type == "cuda",
    )


def endless(batches: ParquetLoader, step: int) -> Iterator[Batch]:
    """Epoch after epoch, from the batch that follows the first `step` ones."""
    epoch, done = divmod(step, len(batches))
    while True:
        batches.set_epoch(epoch)
        batches.load_state_dict(batches.state_dict(done))
        yield from batches
        epoch, done = epoch + 1, 0


def evaluation_batches(
    config: TrainConfig, info: DatasetInfo, split: str, process: Process
) -> ParquetLoader:
    """This rank's share of a split, or of the search-validation rows, in order to the last row.

    A split is scored as a whole, so a rank takes a range of it; of search-validation rows the first
    batches may be looked at alone, so these hold the same rows on any number of ranks.
    """
    rows = config.data.eval_batch_size
    search = split == SEARCH and SEARCH not in info.splits
    return ParquetLoader(
        info,
        "train" if search else split,
        part=(1 - config.data.search_share, 1.0) if search else (0.0, 1.0),
        batch_size=_rows_per_rank("data.eval_batch_size", rows, process),
        rank=process.rank,
        world_size=process.world_size,
        shuffle=False,
        drop_last=False,
        in_ranges=split != SEARCH,
        pin_memory=process.device.type == "cuda",
    )


def loss_scale(batches: ParquetLoader, step_in_epoch: int, world_size: int) -> float:
    """Make the mean of the ranks' losses the mean over rows, where some ranks hold padded rows.

    Args:
        batches: the training split.
        step_in_epoch: the step that comes, from 0.
        world_size: number of ranks.
    """
    whole = batches.batch_size * world_size
    rows = batches.num_rows - step_in_epoch * whole
    if rows >= whole:
        return 1.0
    return world_size * -(-rows // world_size) / rows


def far_column(batches: ParquetLoader, step: int) -> str:
    """What to say of the numeric column that reaches farthest in a batch; empty where none is far.

    Args:
        batches: this rank's training rows, at the epoch of the step.
        step: the batch's place in the epoch.
    """
    batches.load_state_dict(batches.state_dict(step))
    dense = next(iter(batches)).dense
    if not dense.numel():
        return ""
    column = int(dense.abs().amax(dim=0).argmax())
    low, high = float(dense[:, column].min()), float(dense[:, column].max())
    if max(-low, high) < _FAR:
        return ""
    feature = batches.info.numeric[column]
    return (
        f"; numeric column {feature.name!r} goes from {low:.3g} to {high:.3g} in this batch: prepare "
        f"it with a transform that keeps it near zero (--numeric {feature.name}=standard_log)"
    )


def rows_trained(batches: ParquetLoader, epochs: int, steps: int, process: Process) -> int:
    """Rows of all ranks in so many whole epochs and so many steps of another."""
    whole = batches.batch_size * process.world_size
    rows = min(len(batches) * whole, batches.num_rows)  # what fills no batch may be left out
    return epochs * rows + min(steps * whole, rows)


def check_last_batch(model: nn.Module, batches: ParquetLoader, world_size: int) -> None:
    """Raise before training what batch normalisation would raise at the end of an epoch."""
    whole = batches.batch_size * world_size
    left = -(-(batches.num_rows - (len(batches) - 1) * whole) // world_size)
    if left == 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise ConfigError(
            f"{batches.num_rows} training rows in batches of {whole} leave a last batch of one row "
            "per rank, which batch normalisation cannot take; set data.drop_last or another "
            "data.batch_size"
        )


def _rows_per_rank(key: str, rows: int, process: Process) -> int:
    if rows % process.world_size:
        raise ConfigError(
            f"{key} counts the rows of all ranks together, and {rows} rows cannot be shared out "
            f"evenly to {process.world_size} ranks; choose a multiple"
        )
    return rows // process.world_size
