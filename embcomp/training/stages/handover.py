"""From the weights that one stage leaves to those that the next begins with.

Rows are read by range from the checkpoint and handed to the method block by block; what comes out is
written in pieces, from which every rank reads what belongs to it. No process holds more than its own
shards and the blocks that it works on, and no stage depends on how the one before was sharded. What is done
stays done: a hand-over that is killed goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from embcomp.backends.base import MethodState, StageInputs
from embcomp.collection.group_states import GroupState
from embcomp.collection.plan_document import plan_to_document
from embcomp.data_pipelines.frequencies import counted_features, fill_counts
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.layers.block_work import Work
from embcomp.layers.row_sources import RowSource
from embcomp.planning.stage_order import StagedGroup, check_apart_now
from embcomp.tables.budget import parse_budget
from embcomp.training.build import UnshardedModel, initial_rows
from embcomp.training.checkpoint import checked_by_ranks, saved_steps
from embcomp.training.distributed.process import Process
from embcomp.training.files.run_checksums import write_checked
from embcomp.training.reporting.console import RunConsole
from embcomp.training.reporting.stage_result import read_stage_result
from embcomp.training.stages.folder_work import FolderWork
from embcomp.training.stages.id_files import mapped_numbers
from embcomp.training.stages.left_model import LeftModel, path_of
from embcomp.training.stages.other_run import of_another_run
from embcomp.training.stages.run_context import RunContext
from embcomp.training.stages.schedule import with_form
from embcomp.training.stages.start_files import (
    INDEX_FILE,
    remove_the_rest,
    stored_in_pieces,
    write_index,
)
from embcomp.training.stages.work_progress import WorkProgress

_COUNTS = "id-counts"


def left_by(run: RunContext, index: int) -> LeftModel:
    """What a finished stage hands on; for the first one perhaps another run's best weights."""
    if run.config.train.start_from is not None and index == run.schedule.trained[0]:
        return of_another_run(run)
    outcome, _ = read_stage_result(run.place(index))
    return LeftModel.at(run, index, outcome.keeps_step)


def counts_of(info: DatasetInfo, folder: Path, work: Work) -> dict[str, Tensor]:
    """How often each id of each table occurs in the training rows, mapped from files.

    Args:
        info: the dataset.
        folder: the work's, where the files are.
        work: counts a table on one rank.
    """
    features = {feature.name: feature for feature in counted_features(info)}

    def count(name: str, counts: np.ndarray) -> dict[str, Tensor]:
        fill_counts(info, features[name], counts)
        return {}

    sizes = {name: feature.num_embeddings for name, feature in features.items()}
    return mapped_numbers(_COUNTS, sizes, count, folder, work)[0]


def handover_memory(run: RunContext) -> int:
    """Bytes that a rank may hold beside its shards while tables are handed on."""
    return parse_budget(run.config.train.handover_memory, name="train.handover_memory")


def work_in(folder: Path, run: RunContext, process: Process, console: RunConsole) -> FolderWork:
    """What does the work of a stage's folder, within the memory that the config allows.

    Args:
        folder: where its files are.
        run: the run.
        process: the process group; all ranks call this.
        console: what a person sees.
    """
    memory = handover_memory(run)
    label = f"{folder.parent.name}, hand-over"
    return FolderWork(folder, process, memory, WorkProgress(label, console.say))


def prepare_start(run: RunContext, index: int, process: Process, console: RunConsole) -> None:
    """Make the form in which a stage after the first begins; every rank calls it.

    Args:
        run: the run.
        index: the place of the stage.
        process: the process group.
        console: what a person sees.
    """
    place = run.place(index)
    dist.barrier()  # nobody looks while another run's first rank still writes
    if not (place.forms.exists() and (place.start / INDEX_FILE).exists()):
        if process.is_main:
            place.start.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        with work_in(place.start, run, process, console) as work:
            document, tensors = _begun(run, index, work)
        if process.is_main:
            write_index(place.start, tensors)
            write_checked(place.forms, document)
        dist.barrier()
    if process.is_main and not saved_steps(place.checkpoints):
        remove_the_rest(place.start)


def _begun(run: RunContext, index: int, work: Work) -> tuple[str, dict[str, Any]]:
    """How the tables are stored in the stage, and with what it begins."""
    schedule = run.schedule
    before, now = schedule.last_trained_before(index), schedule.run_stages[index]
    left, owner = left_by(run, before), now.owner
    checked_by_ranks(left.folder, work)
    form = owner.method.start_stage(
        now.as_of(owner),
        owner.tables,
        StageInputs(
            before=left.state_of(owner),
            initial=lambda: _initial(run, owner),
            counts=counts_of(run.info, run.place(index).start, work),
            results=search_results(run, index, owner),
            seed=run.config.seed,
            work=work,
        ),
    )
    plan_before = run.plan_of(before)
    assert plan_before is not None
    check_apart_now(owner, form.config, plan_before)
    plan = with_form(plan_before, owner, form.config)
    begun = run.build(torch.device("meta"), plan)
    tensors = _tables_start(left, begun, owner, form, work)
    if not now.stage.reinit_network:
        outside = left.outside(begun.model.state_dict())
        tensors |= stored_in_pieces(outside, work)
    return json.dumps(plan_to_document(plan), indent=1) + "\n", tensors


def search_results(
    run: RunContext, before: int, group: StagedGroup
) -> dict[str, Mapping[str, Any]]:
    """What a method's earlier search stages found, by the names that it calls them."""
    return {
        each.as_of(group).name: read_stage_result(run.place(index))[0].result
        for index, each in enumerate(run.schedule.run_stages[:before])
        if each.stage.kind == "search" and each.is_of(group)
    }


def _initial(run: RunContext, owner: StagedGroup) -> MethodState:
    """The rows of the first stage before its first step."""
    unsharded = run.build(torch.device("meta"), run.schedule.first_plan())
    assert unsharded.tables is not None
    own = owner.names[0]
    path = path_of(unsharded.model, unsharded.tables)
    (group,) = (g for g in unsharded.tables.groups if own in [table.name for table in g.tables])
    rows: dict[str, Tensor | RowSource] = {
        f"rows.{table.name}": initial_rows(
            f"{path}.{group.rows_name(table.name)}", unsharded, run.config
        )
        for table in group.backend.physical_tables
    }
    return MethodState.of(group.config, rows)


def _tables_start(
    left: LeftModel,
    begun: UnshardedModel,
    owner: StagedGroup,
    form: MethodState,
    work: Work,
) -> dict[str, Any]:
    """The tensors of all tables by their names in the model that begins."""
    assert begun.tables is not None
    forms = [GroupState(tables=owner.tables, form=form), *left.states_beside(owner)]
    stored = [
        GroupState(
            tables=each.tables,
            form=MethodState.of(each.form.config, _in_pieces(each, f"{n}", work)),
        )
        for n, each in enumerate(forms)
    ]
    path, found = path_of(begun.model, begun.tables), begun.tables.state_of(stored)
    rows = [g.rows_name(t.name) for g in begun.tables.groups for t in g.backend.physical_tables]
    fresh = not (form.tensors or form.sources)  # which stands for rows as they are drawn
    assert fresh or set(rows) <= set(found), "no row begins as it was drawn"
    return {f"{path}.{name}": tensor for name, tensor in found.items()}


def _in_pieces(each: GroupState, label: str, work: Work) -> dict[str, Any]:
    """A form's tensors; what lies elsewhere is copied, in steps that the label tells from others'."""
    named: dict[str, Tensor | RowSource] = {
        f"{label}.{name}": tensor
        for tensors in (each.form.tensors, each.form.sources)
        for name, tensor in tensors.items()
    }
    return {
        name.removeprefix(f"{label}."): tensor
        for name, tensor in stored_in_pieces(named, work).items()
    }
