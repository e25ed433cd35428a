"""A run from its first stage, or the one where it was interrupted, to its report."""

from __future__ import annotations

import torch.distributed as dist

from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.training.distributed.process import Process
from embcomp.training.loop import Training
from embcomp.training.reporting.console import RunConsole
from embcomp.training.reporting.report import Report
from embcomp.training.reporting.stage_result import Outcome, read_outcome, write_outcome
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.handover import prepare_start
from embcomp.training.stages.schedule import Life, StageSetup
from embcomp.training.stages.search_stage import StageSearch


def run_stages(
    config: TrainConfig, folder: RunFolder, process: Process, console: RunConsole
) -> Report:
    """Does what is left of a run; every rank calls it.

    Args:
        config: The run.
        folder: Its folder, which has been created.
        process: The process group.
        console: What a person sees.
    """
    info = DatasetInfo.load(config.data.path)
    life = Life.of(config, info)
    outcomes: list[Outcome] = []
    log_sizes: dict[str, int] = {}
    for index, stage in enumerate(life.stages):
        place = folder.stage(index, life.names)
        if place.done.exists():
            outcome, log_sizes = read_outcome(place)
            outcomes.append(outcome)
        elif stage.kind == "search":
            search = StageSearch(config, info, life, index, folder, process, console)
            outcomes.append(search.run())
            if process.is_main:
                write_outcome(place, outcomes[-1], log_sizes)
        elif index == 0 and config.train.start_from is not None:
            outcomes.append(
                Outcome(name=stage.name, stopped=f"taken from {config.train.start_from}")
            )
            if process.is_main:
                write_outcome(place, outcomes[-1], log_sizes)
        else:
            if index > life.trained[0] and process.is_main:
                prepare_start(config, info, life, folder, index)
            dist.barrier()
            training = Training(config, folder, process, StageSetup.of(life, index, folder))
            training.train(console, log_sizes)
            if index == life.trained[-1]:
                return training.finish(outcomes)
            training.hand_on()
            outcome, log_sizes = read_outcome(place)
            outcomes.append(outcome)
        dist.barrier()
    raise AssertionError("the last stage of a method trains")
