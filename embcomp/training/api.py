"""What the command line and other programs call: train, evaluate, load."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from embcomp.config import TrainConfig
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import EmbcompError
from embcomp.plan import ResolvedPlan
from embcomp.training.build import build_model, check_precision, shard_model
from embcomp.training.checkpoint import checkpoint_folder, load_weights, read_state, saved_steps
from embcomp.training.console import RunConsole
from embcomp.training.data import check_splits, evaluation_batches
from embcomp.training.evaluation import Evaluation, evaluate_batches
from embcomp.training.handover import check_other_run, load_unsharded
from embcomp.training.life import Life
from embcomp.training.noise import quiet_libraries
from embcomp.training.process import Process, process_group
from embcomp.training.report import Report
from embcomp.training.run import run_stages
from embcomp.training.run_folder import RunFolder, StageFolder
from embcomp.training.served_rows import check_served_types, round_rows, served_types
from embcomp.training.watch import watch_ranks


def train(config: TrainConfig, *, runs: str | Path = "runs", quiet: bool = False) -> Report:
    """Trains, goes on with a run that was interrupted, or returns a finished run's report.

    Under torchrun every rank calls it. The run's folder is `<runs>/<config.name>`.

    Args:
        config: The run, from `embcomp.config.load_config`.
        runs: The folder of all runs.
        quiet: Whether to print nothing.

    Raises:
        ConfigError: The folder holds a run with another config, or the config cannot run.
        DataError: The dataset cannot be read.
        CheckpointError: The folder's checkpoint does not belong to the run.
        RankFailedError: Another rank died; the text has its number.
    """
    info = DatasetInfo.load(config.data.path)
    check_splits(info)
    check_other_run(config, info, Life.of(config, info))
    check_served_types(config)
    folder = RunFolder(Path(runs) / config.name)
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
        return run_stages(config, folder, process, console)


def _open_folder(folder: RunFolder, config: TrainConfig, process: Process) -> None:
    """Creates or checks the run's folder, before anything heavy."""
    is_new = folder.is_new
    if not is_new:
        folder.check_same(config)
    dist.barrier()
    if is_new and process.is_main:
        folder.create(config)
    dist.barrier()


def evaluate(run: str | Path, split: str = "test", *, quiet: bool = False) -> Evaluation:
    """Evaluates a run's best weights on a split; under torchrun every rank calls it.

    Rows are rounded to the config's `tables.row_types` first, as for the run's report; those of a
    stage before the last are not, as they are not what is served.

    Args:
        run: The run's folder.
        split: A split of the run's dataset.
        quiet: Whether to print nothing.
    """
    folder = RunFolder(Path(run))
    config = folder.config()
    with (
        quiet_libraries(),
        process_group(config.train.device) as process,
        watch_ranks(process, config.train.rank_timeout),
        RunConsole(enabled=process.is_main and not quiet, name=config.name) as console,
    ):
        info = DatasetInfo.load(config.data.path)
        life = Life.of(config, info)
        index = latest_stage(life, folder)
        place = folder.stage(index, life.names)
        batches = evaluation_batches(config, info, split, process)
        precision = check_precision(config, process)
        unsharded = build_model(config, info, torch.device("meta"), life.plan_of(index, place))
        sharded = shard_model(unsharded, config, process)
        step = best_step(folder, place)
        load_weights(checkpoint_folder(place.checkpoints, step), sharded)
        if index == life.trained[-1]:
            round_rows(sharded.state_dict(), unsharded, served_types(config, info))
        with precision():
            evaluation = evaluate_batches(sharded, batches, process)
        console.evaluation(split, step, evaluation)
        return evaluation


def load_model(run: str | Path, step: int | None = None) -> nn.Module:
    """A run's network, in one piece on the CPU; no process group is needed.

    Of a run in several stages it is that of the last stage which has a checkpoint.

    Args:
        run: The run's folder.
        step: A step that has a checkpoint; None takes the best.
    """
    folder = RunFolder(Path(run))
    config = folder.config()
    info = DatasetInfo.load(config.data.path)
    life = Life.of(config, info)
    index = latest_stage(life, folder)
    place = folder.stage(index, life.names)
    chosen = best_step(folder, place) if step is None else step
    if not checkpoint_folder(place.checkpoints, chosen).exists():
        raise EmbcompError(
            f"{checkpoint_folder(place.checkpoints, chosen)} does not exist; steps with a "
            f"checkpoint: {_listed(place)}"
        )
    return load_unsharded(config, info, life, folder, index, chosen).model.eval()


def forms_of_run(run: str | Path) -> ResolvedPlan | None:
    """How a run's tables are stored in its last stage so far; None for a model without any."""
    folder = RunFolder(Path(run))
    config = folder.config()
    life = Life.of(config, DatasetInfo.load(config.data.path))
    index = latest_stage(life, folder)
    return life.plan_of(index, folder.stage(index, life.names))


def latest_stage(life: Life, folder: RunFolder) -> int:
    """The last stage that has a checkpoint; the first one where none has."""
    begun = [i for i in life.trained if saved_steps(folder.stage(i, life.names).checkpoints)]
    return begun[-1] if begun else life.trained[0]


def _listed(place: StageFolder) -> str:
    return ", ".join(map(str, saved_steps(place.checkpoints))) or "none"


def best_step(folder: RunFolder, place: StageFolder) -> int:
    """The step whose weights a finished run reports, or the best one of a run that goes on."""
    if folder.report.exists():
        return Report.load(folder.path).best_step
    steps = saved_steps(place.checkpoints)
    if not steps:
        raise EmbcompError(f"{folder.path} has no checkpoint yet; train it first")
    best = read_state(checkpoint_folder(place.checkpoints, steps[-1]))["best_step"]
    return steps[-1] if best is None else int(best)
