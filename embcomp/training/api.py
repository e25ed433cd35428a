"""What the command line and other programs call: train and evaluate."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.integrity import check_vocabularies
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.io.atomic_files import remove_leftovers
from embcomp.training.build import check_precision, shard_model
from embcomp.training.checkpoint import checkpoint_folder, load_weights
from embcomp.training.data import (
    check_dataset,
    check_monitor,
    check_splits,
    evaluation_batches,
)
from embcomp.training.distributed.process import Process, process_group
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.distributed.rank_watchdog import watch_ranks
from embcomp.training.reporting.console import RunConsole
from embcomp.training.reporting.evaluation import Evaluation, evaluate_batches
from embcomp.training.reporting.report import Report
from embcomp.training.run import run_stages
from embcomp.training.run_folder import RunFolder
from embcomp.training.served_rows import check_served_types, round_rows, served_types
from embcomp.training.stages.loading import best_step
from embcomp.training.stages.other_run import check_other_run
from embcomp.training.stages.run_context import RunContext
from embcomp.training.stages.warm_start import check_warm_start


def train(
    config: TrainConfig,
    *,
    runs: str | Path = "runs",
    quiet: bool = False,
    verify: bool = False,
    scores: Path | None = None,
) -> Report:
    """Train, goes on with a run that was interrupted, or return a finished run's report.

    Under torchrun every rank calls it. The run's folder is `<runs>/<config.name>`.

    Args:
        config: the run, from `embcomp.config.load_config`.
        runs: the folder of all runs.
        quiet: whether to print nothing.
        verify: whether every byte of the dataset is compared with its checksum first; what is quick
            to compare always is.
        scores: a file to keep the test split's logits and labels in (`.npz`), as they were evaluated;
            None keeps none.

    Raises:
        ConfigError: The folder holds a run with another config, or the config cannot run.
        DataError: The dataset cannot be read, or is not as it was written.
        CheckpointError: The folder's checkpoint does not belong to the run.
        RankFailedError: Another rank died; the text has its number.
    """
    folder = RunFolder(Path(runs) / config.name)
    folder.check_dataset_is_there(config)
    info = DatasetInfo.load(config.data.path)
    check_splits(info)
    check_vocabularies(info)
    check_monitor(config, info)
    run = replace(RunContext.of(config, info, folder), scores=scores)
    run.schedule.check_installed()
    if config.train.warm_start is None:  # which keeps the structure, wherever ids are
        run.schedule.check_ids(info)
    check_other_run(run)
    check_warm_start(run)
    check_served_types(config, [run.schedule.plan, run.schedule.first_order])
    if not folder.is_new:
        folder.check_same(config)
    check_dataset(info, sorted(info.splits), verify=verify, show=not quiet)
    with (
        quiet_libraries(),
        process_group(config.train.device) as process,
        watch_ranks(process, config.train.rank_timeout),
        folder.locked() if process.is_main else nullcontext(),
        RunConsole(enabled=process.is_main and not quiet, name=config.name) as console,
    ):
        _open_folder(folder, config, process)
        if folder.report.exists():
            console.say(f"{folder.path} is finished; remove it or choose another name to retrain")
            return Report.load(folder.path)
        return run_stages(run, process, console)


def _open_folder(folder: RunFolder, config: TrainConfig, process: Process) -> None:
    """Create or check the run's folder, before anything heavy."""
    is_new = folder.is_new
    if not is_new:
        folder.check_same(config)
    dist.barrier()
    if process.is_main:
        if is_new:
            folder.create(config)
        else:
            remove_leftovers(folder.path)
            folder.follow(config)
    dist.barrier()


def evaluate(
    run: str | Path,
    split: str = "test",
    *,
    quiet: bool = False,
    data: str | Path | None = None,
    verify: bool = False,
) -> Evaluation:
    """Evaluate a run's best weights on a split; under torchrun every rank calls it.

    Rows are rounded to the config's `tables.row_types` first, as for the run's report; those of a
    stage before the last are not, as they are not what is served.

    Args:
        run: the run's folder.
        split: a split of the run's dataset.
        quiet: whether to print nothing.
        data: where the run's dataset lies now; where its config says by default.
        verify: whether every byte of the dataset is compared with its checksum first.
    """
    opened = RunContext.opened(run, data)
    config, info = opened.config, opened.info
    labelled = [split] if split in info.splits else []
    check_dataset(info, labelled, verify=verify, show=not quiet)
    with (
        quiet_libraries(),
        process_group(config.train.device) as process,
        watch_ranks(process, config.train.rank_timeout),
        RunConsole(enabled=process.is_main and not quiet, name=config.name) as console,
    ):
        index = opened.latest_stage()
        place = opened.place(index)
        batches = evaluation_batches(config, info, split, process)
        precision = check_precision(config, process)
        unsharded = opened.build(torch.device("meta"), opened.plan_of(index))
        sharded = shard_model(unsharded, config, process)
        step = best_step(opened.folder, place)
        load_weights(checkpoint_folder(place.checkpoints, step), sharded)
        if index == opened.schedule.trained[-1]:
            round_rows(sharded.state_dict(), unsharded, served_types(config, info))
        with precision():
            evaluation = evaluate_batches(sharded, batches, process)
        console.evaluation(split, step, evaluation)
        return evaluation
