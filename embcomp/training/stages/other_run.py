"""Another run's weights in place of the first stage: what they must fit, and where they lie."""

from __future__ import annotations

from pathlib import Path

import torch

from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import listed
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.left_model import LeftModel
from embcomp.training.stages.loading import best_checkpoint
from embcomp.training.stages.run_context import RunContext


def check_other_run(run: RunContext) -> None:
    """Raise before any training what `train.start_from` cannot start."""
    config, source = run.config, run.config.train.start_from
    if source is None:
        return
    other = RunFolder(Path(source)).config()
    check_same_model("train.start_from", source, other, config)
    there = _moved_dataset(source, config) or other.data.path
    check_same_features("train.start_from", source, DatasetInfo.load(there), run.info)
    if not RunFolder(Path(source)).report.exists():
        raise ConfigError(f"train.start_from: {source} is not finished; train it first")
    of_another_run(run)


def check_same_model(key: str, source: str, theirs: TrainConfig, ours: TrainConfig) -> None:
    """Raise a ConfigError where another run trained another network.

    Args:
        key: the setting that names the run.
        source: its folder.
        theirs: its config.
        ours: this run's.
    """
    if theirs.model != ours.model:
        raise ConfigError(
            f"{key}: {source} trained another model ({theirs.model.name} with other "
            f"settings, or another than {ours.model.name}); both need the same"
        )


def check_same_features(key: str, source: str, theirs: DatasetInfo, ours: DatasetInfo) -> None:
    """Raise a ConfigError where features differ or come in another order.

    Tables are known by their names, but a network takes features by their places.

    Args:
        key: the setting that names another run.
        source: its folder.
        theirs: the dataset that it was trained on.
        ours: this run's.
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
            f"{key}: {source} was trained on other {kind} features, or on the same in "
            f"another order ({what}). Its network knows them by their places: prepare the dataset "
            "with the same features in the same order"
        )


def of_another_run(run: RunContext) -> LeftModel:
    """The best weights of the run that `train.start_from` names.

    Raises:
        ConfigError: it has another model or other tables.
    """
    source = run.config.train.start_from
    assert source is not None
    unsharded = run.build(torch.device("meta"), run.schedule.first_plan())
    moved = _moved_dataset(source, run.config)
    found = LeftModel.in_folder(best_checkpoint(RunContext.opened(source, moved)), unsharded)
    came = found.tensors.shapes
    wanted = {name: tuple(each.shape) for name, each in unsharded.model.state_dict().items()}
    odd = [name for name in sorted({*came, *wanted}) if came.get(name) != wanted.get(name)]
    if odd:
        raise ConfigError(
            f"train.start_from: {source} has another model or other tables than the stage "
            f"{run.schedule.names[0]!r}: they differ in {', '.join(odd[:3])}"
            f"{f' and {len(odd) - 3} more' if len(odd) > 3 else ''}. Use the same dataset, model "
            "and embedding_dim"
        )
    return found


def _moved_dataset(source: str, config: TrainConfig) -> str | None:
    """Where another run's dataset lies, if it is this run's: both may have moved together."""
    here = config.data.path
    return here if RunFolder(Path(source)).has_dataset(here) else None
