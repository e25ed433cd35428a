"""A run from its first stage, or the one where it was interrupted, to its report."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from embcomp.training.checkpoint import saved_steps
from embcomp.training.distributed.process import Process
from embcomp.training.loop import Training
from embcomp.training.reporting.console import RunConsole
from embcomp.training.reporting.report import Report
from embcomp.training.reporting.stage_result import StageResult, read_stage_result, write_outcome
from embcomp.training.stages.handover import prepare_start
from embcomp.training.stages.run_context import RunContext
from embcomp.training.stages.search_stage import StageSearch
from embcomp.training.stages.warm_start import prepare_warm_start


def run_stages(run: RunContext, process: Process, console: RunConsole) -> Report:
    """Does what is left of a run; every rank calls it.

    Args:
        run: the run, whose folder has been created.
        process: the process group.
        console: what a person sees.
    """
    schedule = run.schedule
    outcomes: list[StageResult] = []
    log_sizes: dict[str, int] = {}
    warm = run.config.train.warm_start
    for index, stage in enumerate(schedule.stages):
        place = run.place(index)
        if place.done.exists():
            outcome, log_sizes = read_stage_result(place)
            outcomes.append(outcome)
        elif warm is not None and index < schedule.trained[-1]:
            outcomes.append(StageResult(name=stage.name, stopped=f"taken from {warm}"))
            if process.is_main:
                write_outcome(place, outcomes[-1], log_sizes)
        elif stage.kind == "search":
            outcomes.append(StageSearch(run, index, process, console).run())
            gc.collect()
            if process.is_main:
                write_outcome(place, outcomes[-1], log_sizes)
        elif index == 0 and run.config.train.start_from is not None:
            outcomes.append(
                StageResult(name=stage.name, stopped=f"taken from {run.config.train.start_from}")
            )
            if process.is_main:
                write_outcome(place, outcomes[-1], log_sizes)
        else:
            if warm is not None and not saved_steps(place.checkpoints):
                prepare_warm_start(run, process, console)
            elif index > schedule.trained[0] and not saved_steps(place.checkpoints):
                prepare_start(run, index, process, console)
            dist.barrier()
            report = _train_stage(run, index, process, console, log_sizes, outcomes)
            if report is not None:
                return report
            outcome, log_sizes = read_stage_result(place)
            outcomes.append(outcome)
        dist.barrier()
    raise AssertionError("the last stage of a method trains")


def _train_stage(
    run: RunContext,
    index: int,
    process: Process,
    console: RunConsole,
    log_sizes: Mapping[str, int],
    before: Sequence[StageResult],
) -> Report | None:
    """Train a stage to its end; the run's report where it is the last one.

    Its shards are given back before the next stage has any: TorchRec's modules refer to each other, so that
    they would otherwise wait for the garbage collector, however much they hold.

    Args:
        run: the run.
        index: the place of the stage.
        process: the process group.
        console: what a person sees.
        log_sizes: bytes of the run's logs when the stage began.
        before: what earlier stages ended with.
    """
    training = Training(run, index, process, console, log_sizes)
    training.train()
    if index == run.schedule.trained[-1]:
        return training.finish(before)
    training.hand_on()
    del training
    gc.collect()
    return None
