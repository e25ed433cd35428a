"""From the weights that one stage leaves to those that the next begins with.

The first rank loads the whole model on its CPU, lets the method turn its tables into their next form,
and writes what comes out; then every rank reads what belongs to it. So the host of the first rank
must hold the tables once, and no stage depends on how the one before was sharded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embcomp.backends.base import MethodState, StageInputs
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.group_states import GroupState
from embcomp.collection.plan_document import plan_to_document
from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.frequencies import id_counts
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import CheckpointError, ConfigError
from embcomp.io.atomic_files import atomic_path
from embcomp.io.yaml_reading import listed
from embcomp.layers.learned_buffers import overwriting
from embcomp.training.build import UnshardedModel
from embcomp.training.checkpoint import model_state
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.files.run_checksums import announce_file, check_file, write_checked
from embcomp.training.optim.initial_rows import local_pieces
from embcomp.training.reporting.stage_result import read_stage_result
from embcomp.training.run_folder import RunFolder, StageFolder
from embcomp.training.stages.loading import load_model, load_unsharded
from embcomp.training.stages.run_context import RunContext
from embcomp.training.stages.schedule import StageSchedule


def left_by(run: RunContext, index: int) -> UnshardedModel:
    """What a finished stage hands on; for the first one perhaps another run's best weights."""
    if run.config.train.start_from is not None and index == run.schedule.trained[0]:
        return _of_another_run(run)
    outcome, _ = read_stage_result(run.place(index))
    return load_unsharded(run, index, outcome.keeps_step)


def counts_of(info: DatasetInfo) -> dict[str, Tensor]:
    """How often each id of each table occurs in the training rows."""
    return {name: torch.from_numpy(counts) for name, counts in id_counts(info).items()}


def prepare_start(run: RunContext, index: int) -> None:
    """Write the form in which a stage after the first begins; for one rank."""
    schedule, place = run.schedule, run.place(index)
    assert schedule.method is not None
    if place.forms.exists():
        return
    model = left_by(run, schedule.last_trained_before(index))
    form = schedule.method.start_stage(
        schedule.stages[index],
        schedule.tables,
        StageInputs(
            before=state_of_method(model, schedule),
            initial=lambda: state_of_method(run.initial(), schedule),
            counts=counts_of(run.info),
            results=search_results(run, index),
            seed=run.config.seed,
        ),
    )
    plan = schedule.with_method(form.config)
    begun = run.build(torch.device("meta"), plan)
    tensors = _tables_start(model, begun, schedule, form)
    if not schedule.stages[index].reinit_network:
        tensors |= _network_start(model, begun)
    place.path.mkdir(parents=True, exist_ok=True)
    with atomic_path(place.start) as temporary:
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        announce_file(place.start, temporary)
    write_checked(place.forms, json.dumps(plan_to_document(plan), indent=1) + "\n")


def search_results(run: RunContext, before: int) -> dict[str, Mapping[str, Any]]:
    """What earlier search stages found, by their names."""
    return {
        stage.name: read_stage_result(run.place(index))[0].result
        for index, stage in enumerate(run.schedule.stages[:before])
        if stage.kind == "search"
    }


def state_of_method(model: UnshardedModel, schedule: StageSchedule) -> MethodState:
    """The form of the tables that are trained in stages."""
    assert model.tables is not None
    own = schedule.tables[0].name
    return next(
        each.form for each in model.tables.states() if own in [table.name for table in each.tables]
    )


def load_start(place: StageFolder, sharded: DistributedModelParallel) -> None:
    """Fill a sharded model with what its stage begins with; what is not there stays as drawn."""
    if dist.get_rank() == 0:  # for all ranks, which stop when one does
        check_file(place.start)
    with (
        safetensors.safe_open(place.start, framework="pt") as file,
        torch.no_grad(),
        overwriting(sharded, set(file.keys())),
    ):
        state = model_state(sharded)
        odd = sorted(set(file.keys()) - set(state))
        if odd:
            raise CheckpointError(
                f"{place.start} holds {odd[0]}, which the stage has not: another embcomp wrote it. "
                "Go on with that one, or train again under another name"
            )
        for name in file.keys():
            whole = file.get_slice(name)
            for piece, (row, column) in local_pieces(state[name]):
                _fill(piece, whole, tuple(whole.get_shape()), row, column)


@torch.no_grad()
def load_tensors_of(whole: Mapping[str, Tensor], sharded: DistributedModelParallel) -> None:
    """Fill a sharded model with whole tensors by their names in the unsharded one."""
    for name, value in model_state(sharded).items():
        for piece, (row, column) in local_pieces(value):
            _fill(piece, whole[name], tuple(whole[name].shape), row, column)


def _fill(piece: Tensor, whole: Any, shape: tuple[int, ...], row: int, column: int) -> None:
    """Copy a piece's part of a tensor, or of a slice of a file."""
    if len(shape) != 2:
        piece.copy_(whole[...])
        return
    columns = min(piece.shape[1], shape[1] - column)
    piece.zero_()  # columns that only pad rows to a kernel's width
    if columns > 0 and len(piece):
        piece[:, :columns] = whole[row : row + len(piece), column : column + columns]


def _tables_start(
    model: UnshardedModel, begun: UnshardedModel, schedule: StageSchedule, form: MethodState
) -> dict[str, Tensor]:
    """The tensors of all tables by their names in the model that begins."""
    assert model.tables is not None
    assert begun.tables is not None
    forms = [GroupState(tables=schedule.tables, form=form)]
    forms += [each for each in model.tables.states() if each.form.config != form.config]
    path = path_of(begun.model, begun.tables)
    return {f"{path}.{name}": tensor for name, tensor in begun.tables.state_of(forms).items()}


def _network_start(model: UnshardedModel, begun: UnshardedModel) -> dict[str, Tensor]:
    """What lies outside the embedding tables: the same in every stage."""
    assert begun.tables is not None
    inside = path_of(begun.model, begun.tables) + "."
    wanted = begun.model.state_dict()
    return {
        name: tensor
        for name, tensor in model.model.state_dict().items()
        if name in wanted and not name.startswith(inside)
    }


def path_of(model: torch.nn.Module, collection: CompressedEmbeddingBagCollection) -> str:
    """Where a collection is inside a model."""
    return next(path for path, module in model.named_modules() if module is collection)


def check_other_run(run: RunContext) -> None:
    """Raise before any training what `train.start_from` cannot start."""
    config, source = run.config, run.config.train.start_from
    if source is None:
        return
    other = RunFolder(Path(source)).config()
    if other.model != config.model:
        raise ConfigError(
            f"train.start_from: {source} trained another model ({other.model.name} with other "
            f"settings, or another than {config.model.name}); both need the same"
        )
    there = _moved_dataset(source, config) or other.data.path
    _check_same_features(source, DatasetInfo.load(there), run.info)
    if not RunFolder(Path(source)).report.exists():
        raise ConfigError(f"train.start_from: {source} is not finished; train it first")
    with quiet_libraries():
        _of_another_run(run)


def _check_same_features(source: str, theirs: DatasetInfo, ours: DatasetInfo) -> None:
    """Raise a ConfigError where features differ or come in another order.

    Tables are known by their names, but a network takes features by their places.
    """
    for kind, there, here in (
        ("categorical", theirs.categorical_names, ours.categorical_names),
        ("numeric", theirs.numeric_names, ours.numeric_names),
    ):
        if there == here:
            continue
        odd = sorted(set(there) ^ set(here))
        place = next((n for n, (a, b) in enumerate(zip(there, here)) if a != b), 0)
        what = (
            f"{listed(odd)} is in one of them only"
            if odd
            else f"{there[place]!r} is where this one has {here[place]!r}"
        )
        raise ConfigError(
            f"train.start_from: {source} was trained on other {kind} features, or on the same in "
            f"another order ({what}). Its network knows them by their places: prepare the dataset "
            "with the same features in the same order"
        )


def _of_another_run(run: RunContext) -> UnshardedModel:
    source = run.config.train.start_from
    assert source is not None
    unsharded = run.build(torch.device("cpu"), run.schedule.first_plan())
    moved = _moved_dataset(source, run.config)
    came: Mapping[str, Tensor] = load_model(Path(source), data=moved).state_dict()
    wanted = unsharded.model.state_dict()
    odd = [n for n in sorted({*came, *wanted}) if _shape(came, n) != _shape(wanted, n)]
    if odd:
        raise ConfigError(
            f"train.start_from: {source} has another model or other tables than the stage "
            f"{run.schedule.names[0]!r}: they differ in {', '.join(odd[:3])}"
            f"{f' and {len(odd) - 3} more' if len(odd) > 3 else ''}. Use the same dataset, model "
            "and embedding_dim"
        )
    unsharded.model.load_state_dict(came)
    return unsharded


def _moved_dataset(source: str, config: TrainConfig) -> str | None:
    """Where another run's dataset lies, if it is this run's: both may have moved together."""
    here = config.data.path
    return here if RunFolder(Path(source)).has_dataset(here) else None


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
