"""A run from its first stage, or the one where it was interrupted, to its report."""

from __future__ import annotations

import torch.distributed as dist

from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.training.distributed.process import Process
from embcomp.training.loop import Training
from embcomp.training.reporting.console import RunConsole
from embcomp.training.reporting.report import Report
from embcomp.training.reporting.stage_result import StageResult, read_stage_result, write_outcome
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.handover import prepare_start
from embcomp.training.stages.schedule import StageSchedule, StageSetup
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
    schedule = StageSchedule.of(config, info)
    outcomes: list[StageResult] = []
    log_sizes: dict[str, int] = {}
    for index, stage in enumerate(schedule.stages):
        place = folder.stage(index, schedule.names)
        if place.done.exists():
            outcome, log_sizes = read_stage_result(place)
            outcomes.append(outcome)
        elif stage.kind == "search":
            search = StageSearch(config, info, schedule, index, folder, process, console)
            outcomes.append(search.run())
            if process.is_main:
                write_outcome(place, outcomes[-1], log_sizes)
        elif index == 0 and config.train.start_from is not None:
            outcomes.append(
                StageResult(name=stage.name, stopped=f"taken from {config.train.start_from}")
            )
            if process.is_main:
                write_outcome(place, outcomes[-1], log_sizes)
        else:
            if index > schedule.trained[0] and process.is_main:
                prepare_start(config, info, schedule, folder, index)
            dist.barrier()
            training = Training(config, folder, process, StageSetup.of(schedule, index, folder))
            training.train(console, log_sizes)
            if index == schedule.trained[-1]:
                return training.finish(outcomes)
            training.hand_on()
            outcome, log_sizes = read_stage_result(place)
            outcomes.append(outcome)
        dist.barrier()
    raise AssertionError("the last stage of a method trains")
