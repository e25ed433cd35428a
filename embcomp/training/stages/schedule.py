"""A run's stages: which method learns in them, and in which form its tables begin each of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from embcomp.backends.base import BackendConfig
from embcomp.backends.stages import Stage
from embcomp.collection.groups import group_labels
from embcomp.collection.plan import ResolvedPlan
from embcomp.collection.plan_document import plan_from_document
from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.frequencies import id_counts
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import CheckpointError, ConfigError, EmbcompError, one_line
from embcomp.io.yaml_reading import listed
from embcomp.planning.config_plan import first_order_plan, main_plan, sizes_of
from embcomp.tables.specs import TableSpec
from embcomp.training.files.run_checksums import read_checked
from embcomp.training.run_folder import RunFolder, StageFolder
from embcomp.training.second_order import check_unrolled


@dataclass(frozen=True, kw_only=True)
class StageSchedule:
    """The stages of one run.

    Attributes:
        plan: the methods as the config has them, sizes fixed; None for a model without tables.
        first_order: the same of the first-order weights, which have no stages.
        method: the method that is trained in stages; None where each is trained once.
        stages: what is done, in order, with the config's own wishes for each.
    """

    plan: ResolvedPlan | None
    first_order: ResolvedPlan | None
    method: BackendConfig | None
    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, config: TrainConfig, info: DatasetInfo) -> StageSchedule:
        """The stages that a config's methods ask for.

        Raises:
            ConfigError: When two methods want stages of their own, or first-order weights do.
        """
        sizes = sizes_of(info)
        plan = main_plan(config, sizes)
        groups = [] if plan is None else plan.groups
        staged = [method for method, _ in groups if len(method.stages()) > 1]
        if len(staged) > 1:
            raise ConfigError(
                f"tables: {listed(dict.fromkeys(m.name for m in staged))} with different settings "
                "are each trained in stages of their own; one run has room for one of them"
            )
        linear = config.tables.first_order.settings
        if config.model.settings.uses_first_order and len(linear.stages()) > 1:
            raise ConfigError(
                f"tables.first_order: {linear.name} is trained in stages; first-order weights "
                "take a method that is trained once"
            )
        method = staged[0] if staged else None
        stages = (Stage(name="train"),) if method is None else method.stages()
        if config.train.start_from is not None and method is None:
            raise ConfigError(
                f"train.start_from: {config.tables.method.name} is trained in one stage, so that "
                "another run's weights would leave nothing to do; it is for methods in stages"
            )
        if method is not None and any(stage.second_order for stage in stages):
            check_unrolled(method.name, config)
        first_order = first_order_plan(config, sizes)
        return cls(
            plan=plan,
            first_order=first_order,
            method=method,
            stages=tuple(_wished(s, config) for s in stages),
        )

    def check_installed(self) -> None:
        """Raise before any training what a later stage would miss."""
        if self.method is None:
            return
        missing = self.method.missing()
        if missing is not None:
            raise ConfigError(f"{self.method.name}: {missing}")

    def check_ids(self, info: DatasetInfo) -> None:
        """Raise before any training where ids are not ranked as a method needs them to be."""
        groups = [] if self.plan is None else self.plan.groups
        needing = [(method, tables) for method, tables in groups if method.needs_ranked_ids]
        if not needing:
            return
        counts = {name: torch.from_numpy(own) for name, own in id_counts(info).items()}
        for method, tables in needing:
            method.check_ids(tables, counts)

    @property
    def names(self) -> list[str]:
        """The stages' names."""
        return [stage.name for stage in self.stages]

    @property
    def tables(self) -> list[TableSpec]:
        """The tables of the method that is trained in stages, in the order of their names."""
        assert self.plan is not None
        return next(tables for method, tables in self.plan.groups if method == self.method)

    @property
    def trained(self) -> list[int]:
        """The places of the stages that train."""
        return [index for index, stage in enumerate(self.stages) if stage.kind == "train"]

    def first_plan(self) -> ResolvedPlan | None:
        """How the tables are stored in the first stage."""
        return self.plan if self.method is None else self.with_method(self.method.first_method())

    def with_method(self, form: BackendConfig) -> ResolvedPlan:
        """The plan with another form of the method that is trained in stages."""
        assert self.plan is not None
        own = dict.fromkeys((table.name for table in self.tables), form)
        return ResolvedPlan(self.plan.tables, {**self.plan.methods, **own})

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

    def structure_prefix(self, collection_path: str) -> str | None:
        """What the names of the method's own parameters begin with inside the model.

        Args:
            collection_path: the embedding tables' path inside the model.
        """
        if self.schedule.method is None or self.plan is None:
            return None
        own = self.schedule.tables[0].name
        for label, (_, tables) in zip(group_labels(self.plan.groups), self.plan.groups):
            if own in [table.name for table in tables]:
                return f"{collection_path}.combine.combines.{label}."
        return None


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
