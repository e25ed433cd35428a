"""A run's stages: which methods learn in them, and in which form its tables begin each of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from embcomp.backends.base import BackendConfig
from embcomp.backends.stages import Stage
from embcomp.collection.groups import group_labels
from embcomp.collection.plan import ResolvedPlan
from embcomp.collection.plan_document import plan_from_document
from embcomp.config.train_config import TrainConfig, is_combined
from embcomp.data_pipelines.frequencies import id_counts
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import CheckpointError, ConfigError, EmbcompError, one_line
from embcomp.io.yaml_reading import did_you_mean, listed
from embcomp.planning.config_plan import first_order_plan, main_plan, sizes_of
from embcomp.planning.stage_order import RunStage, StagedGroup, ordered_stages, staged_groups
from embcomp.training.files.run_checksums import read_checked
from embcomp.training.run_folder import RunFolder, StageFolder
from embcomp.training.second_order import check_unrolled


@dataclass(frozen=True, kw_only=True)
class StageSchedule:
    """The stages of one run.

    Attributes:
        plan: the methods as the config has them, sizes fixed; None for a model without tables.
        first_order: the same of the first-order weights, which have no stages.
        staged: the methods that are trained in stages; none where each is trained once.
        run_stages: what is done, in order, with the config's own wishes for each.
    """

    plan: ResolvedPlan | None
    first_order: ResolvedPlan | None
    staged: Sequence[StagedGroup]
    run_stages: Sequence[RunStage]

    @classmethod
    def of(cls, config: TrainConfig, info: DatasetInfo) -> StageSchedule:
        """The stages that a config's methods ask for.

        Raises:
            ConfigError: When methods cannot be trained in one run, or first-order weights want stages.
        """
        sizes = sizes_of(info)
        plan = main_plan(config, sizes)
        staged = staged_groups(plan)
        stages = ordered_stages(staged)
        linear = config.tables.first_order.settings
        if config.model.settings.uses_first_order and len(linear.stages()) > 1:
            raise ConfigError(
                f"tables.first_order: {linear.name} is trained in stages; first-order weights "
                "take a method that is trained once"
            )
        if config.train.start_from is not None and not staged:
            raise ConfigError(
                f"train.start_from: {config.tables.method.name} is trained in one stage, so that "
                "another run's weights would leave nothing to do; it is for methods in stages"
            )
        for group in staged:
            if any(stage.second_order for stage in group.method.stages()):
                check_unrolled(group.method.name, config)
        _check_wishes(config, staged, [each.stage.name for each in stages])
        if config.train.warm_start is not None and len(stages) > 1:
            # What was approximated has been trained on since: the last stage is a training like any other.
            whole = replace(
                stages[-1].stage,
                epochs=None,
                max_steps=None,
                learning_rate=1.0,
                reinit_network=False,
            )
            stages = [*stages[:-1], replace(stages[-1], stage=whole)]
        return cls(
            plan=plan,
            first_order=first_order_plan(config, sizes),
            staged=staged,
            run_stages=[replace(each, stage=_wished(each.stage, config)) for each in stages],
        )

    def check_installed(self) -> None:
        """Raise before any training what a later stage would miss."""
        for group in self.staged:
            missing = group.method.missing()
            if missing is not None:
                raise ConfigError(f"{group.method.name}: {missing}")

    def check_ids(self, info: DatasetInfo) -> None:
        """Raise before any training where ids are not ranked or numbered as a method needs them to be."""
        groups = [] if self.plan is None else self.plan.groups
        vocabularies = {
            feature.name: info.checksums[feature.vocabulary].sha256
            for feature in info.categorical
            if feature.vocabulary in info.checksums
        }
        for method, tables in groups:
            method.check_vocabularies(tables, vocabularies)
        needing = [(method, tables) for method, tables in groups if method.needs_ranked_ids]
        if not needing:
            return
        counts = {name: torch.from_numpy(own) for name, own in id_counts(info).items()}
        for method, tables in needing:
            method.check_ids(tables, counts)

    @property
    def stages(self) -> list[Stage]:
        """What is done, in order, under the names of the run."""
        return [each.stage for each in self.run_stages]

    @property
    def names(self) -> list[str]:
        """The stages' names."""
        return [stage.name for stage in self.stages]

    @property
    def trained(self) -> list[int]:
        """The places of the stages that train."""
        return [index for index, stage in enumerate(self.stages) if stage.kind == "train"]

    def waiting(self, index: int) -> list[StagedGroup]:
        """The methods whose turn comes after a stage that is none of theirs."""
        later = self.run_stages[index + 1 :]
        return [
            group
            for group in self.staged
            if not self.run_stages[index].is_of(group) and any(each.is_of(group) for each in later)
        ]

    def first_plan(self) -> ResolvedPlan | None:
        """How the tables are stored in the first stage."""
        plan = self.plan
        for group in self.staged:
            assert plan is not None
            plan = with_form(plan, group, group.method.first_method())
        return plan

    def plan_of(self, index: int, folder: StageFolder) -> ResolvedPlan | None:
        """How the tables are stored in a stage that has begun."""
        if index == self.trained[0]:
            return self.first_plan()
        assert self.plan is not None
        document = _forms(folder)
        return plan_from_document(document, self.plan.tables, source=str(folder.forms))

    def last_trained_before(self, index: int) -> int:
        """The stage whose weights a later one begins with."""
        return max(place for place in self.trained if place < index)


def with_form(plan: ResolvedPlan, group: StagedGroup, form: BackendConfig) -> ResolvedPlan:
    """A plan with another form of a method that is trained in stages."""
    return ResolvedPlan(plan.tables, {**plan.methods, **dict.fromkeys(group.names, form)})


@dataclass(frozen=True, kw_only=True)
class StageSetup:
    """One stage of a run, ready to begin.

    Attributes:
        schedule: all stages.
        index: the place of this one.
        plan: how the tables are stored in it.
        folder: where its files lie.
    """

    schedule: StageSchedule
    index: int
    plan: ResolvedPlan | None
    folder: StageFolder

    @classmethod
    def of(cls, schedule: StageSchedule, index: int, folder: RunFolder) -> StageSetup:
        """A stage whose forms are known."""
        own = folder.stage(index, schedule.names)
        return cls(schedule=schedule, index=index, plan=schedule.plan_of(index, own), folder=own)

    @property
    def stage(self) -> Stage:
        """What it does."""
        return self.schedule.stages[self.index]

    @property
    def label(self) -> str:
        """The stage's name for logs; empty where there is one stage only."""
        return self.stage.name if len(self.schedule.stages) > 1 else ""

    @property
    def owners(self) -> list[StagedGroup]:
        """The methods whose stage it is."""
        return [group for group, _ in self.schedule.run_stages[self.index].owners]

    def own_stage(self, group: StagedGroup) -> Stage:
        """The stage as one of its owners knows it."""
        return self.schedule.run_stages[self.index].as_of(group)

    @property
    def waiting(self) -> list[StagedGroup]:
        """The methods whose turn is to come."""
        return self.schedule.waiting(self.index)

    def structure_prefix(self, group: StagedGroup, collection_path: str) -> str:
        """What the names of a method's own parameters begin with inside the model.

        Args:
            group: a method that is trained in stages.
            collection_path: the embedding tables' path inside the model.
        """
        assert self.plan is not None
        labels = group_labels(self.plan.groups)
        label = next(
            label
            for label, (_, tables) in zip(labels, self.plan.groups)
            if group.names[0] in [table.name for table in tables]
        )
        return f"{collection_path}.combine.combines.{label}."


def _forms(folder: StageFolder) -> list[dict[str, Any]]:
    try:
        return list(json.loads(read_checked(folder.forms)))
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, EmbcompError):
            raise
        raise CheckpointError(
            f"{folder.forms} cannot be read ({one_line(error)}); remove {folder.path}, and the run begins "
            "that stage again"
        ) from None


def _wished(stage: Stage, config: TrainConfig) -> Stage:
    wish = config.train.stages.get(stage.name)
    if wish is None:
        return stage
    return replace(
        stage,
        epochs=stage.epochs if wish.epochs is None else wish.epochs,
        max_steps=stage.max_steps if wish.max_steps is None else wish.max_steps,
        learning_rate=stage.learning_rate if wish.learning_rate is None else wish.learning_rate,
    )


def _check_wishes(config: TrainConfig, staged: Sequence[StagedGroup], names: list[str]) -> None:
    """Raise where `train.stages` names a stage that a run of several methods has not."""
    for name in config.train.stages:
        if name not in names and (len(staged) > 1 or is_combined(name)):
            raise ConfigError(
                f"train.stages: unknown stage {name!r}{did_you_mean(name, names)}; the stages of "
                f"this run are {listed(names)}"
            )
