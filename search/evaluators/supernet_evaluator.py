"""Scores candidates without training them: one supernet holds nested embeddings of every width.

Weight sharing as in Lyu et al., "OptEmbed", CIKM 2022, https://arxiv.org/abs/2208.04482, for any
sampler. The supernet is an ordinary run in stages whose own search is left out; search-validation
rows are held out of its training and choose no step of it. A candidate is the supernet with the
tables cut to its widths, and its score one pass over those rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from typing_extensions import override

from embcomp.backends.widths.supernet import Trial
from embcomp.config.train_config import TrainConfig, is_loss, parse_config
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError, EmbcompError
from embcomp.io.atomic_files import write_atomically
from embcomp.io.folder_lock import folder_lock
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.evaluators.base import Evaluator, Task, TrialHandle, TrialResult
from embcomp.search.evaluators.dataset_view import write_view
from embcomp.search.evaluators.training_evaluator import Slot, TrainingRun, full_steps, search_steps
from embcomp.search.space.recipes import for_search
from embcomp.search.space.space import Candidate, Space
from embcomp.search.space.widths import widths_of
from embcomp.tables.specs import TableSpec
from embcomp.training.distributed.process import Process, process_group
from embcomp.training.distributed.quiet import quiet_libraries
from embcomp.training.reporting.console import RunConsole
from embcomp.training.reporting.report import Report
from embcomp.training.run_folder import RunFolder
from embcomp.training.stages.run_context import RunContext
from embcomp.training.stages.search_stage import StageSearch

NAME = "supernet"
_LOOK_EVERY = 0.2  # seconds between two looks at the supernet's training
_SEARCH = 1  # the place of the search, in the stages of either method
_NO_SEARCH = {"generations": 0, "population": 1, "mutants": 0, "crossovers": 0}


class Scored(TrialHandle):
    """A candidate whose score is known.

    Args:
        outcome: the score.
    """

    def __init__(self, outcome: TrialResult) -> None:
        self._outcome = outcome

    @override
    def poll(self) -> TrialResult:
        return self._outcome


class SupernetEvaluator(Evaluator):
    """Trains a supernet once, then scores each candidate by one pass.

    Args:
        config: the search.
        space: its space, of widths alone.
        folder: the search's folder.
        slots: what running trainings may use; the supernet takes the first.
        budget: serving bytes.

    Raises:
        ConfigError: when the space holds anything but widths.
    """

    def __init__(
        self, config: SearchConfig, space: Space, folder: Path, slots: Sequence[Slot], budget: int
    ) -> None:
        self._config, self._space, self._folder = config, space, folder
        self._slot, self._view = slots[0], folder / "data"
        self._widths = widths_of(space)
        self._budget = budget
        self._open = ExitStack()
        self._trial: Trial | None = None
        self._process: Process | None = None
        self._tables: list[TableSpec] = []
        info = DatasetInfo.load(space.base.data.path)
        self.full_steps = full_steps(space.base, info)
        rows, share = info.split("train").rows, space.base.data.search_share
        trained = round((1 - share) * rows)
        scored = min(config.evaluator.rows or rows, rows - trained)
        if scored < 1:
            raise ConfigError(
                f"data.search_share: {share} of {rows:,} training rows leave no row to score "
                "candidates on; raise overrides.data.search_share"
            )
        steps = search_steps(config.fidelity, space.base, info, rows=trained)
        self.fidelity = (
            f"{steps:,} training steps of one {config.evaluator.method} supernet, on "
            f"{scored:,} search-validation rows"
        )

    @override
    def prepare(self) -> None:
        write_view(self._space.base.data.path, self._view, self._config.fidelity.valid_rows)
        train_config = self.supernet_config()
        run = RunFolder(self._folder / NAME)
        report = self._train(train_config, run)
        self.prepared = TrialResult(seconds=report.train_seconds, steps=report.steps)
        self._load(train_config, run)

    def supernet_config(self) -> TrainConfig:
        """The run that trains the supernet: the recipe with nested tables, and no search."""
        base, evaluator = self._space.base, self._config.evaluator
        document = base.model_dump(mode="json", exclude_defaults=True)
        grid = sorted({width for places in self._widths for width in places})
        method: dict[str, Any] = {
            "name": evaluator.method,
            "width_grid": grid,
            **evaluator.settings,
        }
        method |= {"target_bytes": self._budget, **_NO_SEARCH}
        train = dict(document.get("train", {}))
        if evaluator.method == "optembed":
            method["prune"] = "widths"
            train["stages"] = {"retrain": {"epochs": 0}}
        else:
            method |= {"choose": "evolution", "finetune_epochs": 0}
            train.pop("stages", None)
        dropped = ("budget", "overrides", "row_types")
        tables = {k: v for k, v in document["tables"].items() if k not in dropped}
        document |= {
            "name": NAME,
            "seed": self._config.seed,
            "tables": {**tables, "method": method},
            "train": train,
        }
        config = parse_config(document, source=NAME)
        return for_search(self._config, config, str(self._view.resolve()))

    def _train(self, config: TrainConfig, run: RunFolder) -> Report:
        """Train it, goes on with it, or wait for the worker that does."""
        with folder_lock(self._folder / f"{NAME}.lock", busy=None):
            if not run.is_new:
                run.check_same(config)
            if not run.report.exists():
                self._run(config)
            return Report.load(run.path)

    def _run(self, config: TrainConfig) -> None:
        path = self._folder / f"{NAME}.yaml"
        write_atomically(path, config.to_yaml())
        training = TrainingRun(
            config_path=path,
            name=NAME,
            runs=self._folder,
            slot=self._slot,
            quality=self._config.quality,
            world_size=self._config.trials.world_size,
            clean=False,
        )
        try:
            while (outcome := training.poll()) is None:
                time.sleep(_LOOK_EVERY)
        except BaseException:
            training.detach()
            raise
        if outcome.failure is not None:
            raise EmbcompError(
                f"the supernet was not trained: {outcome.failure}: {outcome.message}; its log is "
                f"{training.log}, and the same command goes on from its last checkpoint"
            )

    def _load(self, config: TrainConfig, run: RunFolder) -> None:
        self._open.enter_context(quiet_libraries())
        process = self._open.enter_context(process_group(config.train.device))
        self._process = process
        console = self._open.enter_context(RunConsole(enabled=False, name=NAME))
        opened = RunContext.of(config, DatasetInfo.load(config.data.path), run)
        self._tables = opened.schedule.staged[0].tables
        context = StageSearch(opened, _SEARCH, process, console)
        self._trial = Trial(self._tables, context)

    @property
    def process(self) -> Process:
        """Where candidates are scored."""
        assert self._process is not None, "prepare() comes first"
        return self._process

    @override
    def start(self, task: Task) -> Scored:
        begun = time.monotonic()
        score = self.score(task.candidate)
        return Scored(TrialResult(quality=score, seconds=time.monotonic() - begun))

    def score(self, candidate: Candidate) -> float:
        """The metric of the supernet with its tables cut to a candidate's widths."""
        assert self._trial is not None, "prepare() comes first"
        widths = {
            table.name: places[chosen]
            for unit, places, chosen in zip(self._space.units, self._widths, candidate)
            for table in unit.tables
        }
        named = tuple(widths[table.name] for table in self._tables)
        score = self._trial.score(named, self._config.evaluator.rows)
        return -score if is_loss(self._config.quality) else score

    @override
    def close(self) -> None:
        self._trial = None
        self._open.close()
