"""A run's weights in one piece on the CPU, whatever devices trained them; no process group is needed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from embcomp.collection.plan import ResolvedPlan
from embcomp.errors import EmbcompError
from embcomp.layers.learned_buffers import overwriting
from embcomp.training.build import UnshardedModel
from embcomp.training.checkpoint import (
    checkpoint_folder,
    load_whole,
    read_state,
    saved_steps,
)
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.reporting.report import Report
from embcomp.training.run_folder import RunFolder, StageFolder
from embcomp.training.stages.run_context import RunContext


def load_model(
    run: str | Path, step: int | None = None, *, data: str | Path | None = None
) -> nn.Module:
    """A run's network, in one piece on the CPU; no process group is needed.

    Of a run in several stages it is that of the last stage which has a checkpoint.

    Args:
        run: the run's folder.
        step: a step that has a checkpoint; None takes the best.
        data: where the run's dataset lies now; where its config says by default.
    """
    return load_trained(RunContext.opened(run, data), step)


def load_trained(run: RunContext, step: int | None = None) -> nn.Module:
    """The network of a run that is open already; see `load_model`."""
    index = run.latest_stage()
    place = run.place(index)
    chosen = best_step(run.folder, place) if step is None else step
    _existing(place, chosen)
    return load_unsharded(run, index, chosen).model.eval()


def best_checkpoint(run: RunContext) -> Path:
    """The checkpoint of a run's best weights, in its last stage that has one."""
    place = run.place(run.latest_stage())
    return _existing(place, best_step(run.folder, place))


def _existing(place: StageFolder, step: int) -> Path:
    folder = checkpoint_folder(place.checkpoints, step)
    if not folder.exists():
        raise EmbcompError(f"{folder} does not exist; steps with a checkpoint: {_listed(place)}")
    return folder


def forms_of_run(run: str | Path, data: str | Path | None = None) -> ResolvedPlan | None:
    """How a run's tables are stored in its last stage so far; None for a model without any."""
    opened = RunContext.opened(run, data)
    return opened.plan_of(opened.latest_stage())


def load_unsharded(run: RunContext, index: int, step: int) -> UnshardedModel:
    """A stage's weights.

    Args:
        run: the run.
        index: the place of a stage that trains.
        step: a step of that stage that has a checkpoint.
    """
    unsharded = run.build(torch.device("cpu"), run.plan_of(index))
    path = checkpoint_folder(run.place(index).checkpoints, step)
    if not path.exists():
        raise EmbcompError(f"{path} does not exist")
    read_state(path)  # refuses other formats
    with overwriting(unsharded.model):
        state = unsharded.model.state_dict()
        with quiet_libraries():
            load_whole(path, state)
        unsharded.model.load_state_dict(state)
    return unsharded


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
