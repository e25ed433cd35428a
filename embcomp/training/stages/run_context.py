"""A run, by one name: its config, its dataset, its stages and its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from embcomp.collection.plan import ResolvedPlan
from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.training.build import UnshardedModel, build_model
from embcomp.training.checkpoint import saved_steps
from embcomp.training.run_folder import RunFolder, StageFolder
from embcomp.training.stages.schedule import StageSchedule, StageSetup


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Made once per command and handed on, so that nothing of it is read or resolved again.

    Attributes:
        config: the run's config.
        info: the dataset's description.
        schedule: the stages, with the plans of all tables.
        folder: where the run lies.
        scores: a file for the logits and labels of the test split; None keeps none.
    """

    config: TrainConfig
    info: DatasetInfo
    schedule: StageSchedule
    folder: RunFolder
    scores: Path | None = None

    @classmethod
    def of(cls, config: TrainConfig, info: DatasetInfo, folder: RunFolder) -> RunContext:
        """Resolve the plan and the stages of a run.

        Raises:
            ConfigError: for tables or stages that cannot be.
            BudgetError: for a budget below the floor.
        """
        schedule = StageSchedule.of(config, info)
        return cls(config=config, info=info, schedule=schedule, folder=folder)

    @classmethod
    def opened(cls, run: str | Path, data: str | Path | None = None) -> RunContext:
        """A run that has begun, from its folder.

        Args:
            run: its folder.
            data: where its dataset lies now; where its config says by default.
        """
        folder = RunFolder(Path(run))
        config = folder.config(data)
        return cls.of(config, folder.dataset(config), folder)

    def place(self, index: int) -> StageFolder:
        """Where a stage's files lie."""
        return self.folder.stage(index, self.schedule.names)

    def setup(self, index: int) -> StageSetup:
        """A stage whose plan is known."""
        return StageSetup.of(self.schedule, index, self.folder)

    def plan_of(self, index: int) -> ResolvedPlan | None:
        """How the tables are stored in a stage that has begun."""
        return self.schedule.plan_of(index, self.place(index))

    def latest_stage(self) -> int:
        """The last stage that has a checkpoint; the first one where none has."""
        begun = [i for i in self.schedule.trained if saved_steps(self.place(i).checkpoints)]
        return begun[-1] if begun else self.schedule.trained[0]

    def build(self, device: torch.device, plan: ResolvedPlan | None) -> UnshardedModel:
        """The network around tables that are stored as `plan` says, rows on a device."""
        return build_model(self.config, self.info, device, plan, self.schedule.first_order)
