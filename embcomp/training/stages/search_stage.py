"""A stage that trains nothing: a method tries structures on the model that the stage before left."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from embcomp.backends.base import MethodState
from embcomp.collection.combine import Combine
from embcomp.config.train_config import is_loss
from embcomp.data_pipelines.loader.batch import Batch
from embcomp.errors import EmbcompError
from embcomp.io.atomic_files import write_atomically
from embcomp.io.json_values import without_nan
from embcomp.layers.block_work import Work
from embcomp.training.build import check_precision, shard_model
from embcomp.training.checkpoint import load_weights
from embcomp.training.data import SEARCH, evaluation_batches
from embcomp.training.distributed.process import Process
from embcomp.training.files.run_checksums import read_sealed_json, sealed_json
from embcomp.training.reporting.console import RunConsole
from embcomp.training.reporting.evaluation import evaluate_batches
from embcomp.training.reporting.report import metrics_record
from embcomp.training.reporting.stage_result import StageResult
from embcomp.training.run_folder import StageFolder
from embcomp.training.stages.batch_norm import refit, running_norms
from embcomp.training.stages.handover import counts_of, left_by, work_in
from embcomp.training.stages.run_context import RunContext
from embcomp.training.stages.shared_tensors import SharedTensors

_WORK = "work"
_REFITTED = 2  # batches that a structure's batch-norm statistics are taken from


class StageSearch:
    """Runs a method's search; it is a `SearchContext`.

    Every rank runs the same search on the same scores. As many batches as a candidate is scored on are
    kept in memory; where all rows are asked for, the rest is read anew. Batch norms are fitted to each
    structure before it is scored.

    Args:
        run: the run.
        index: the place of the search among its stages.
        process: the process group.
        console: what a person sees.
    """

    def __init__(
        self,
        run: RunContext,
        index: int,
        process: Process,
        console: RunConsole,
    ) -> None:
        self._config, self._info, self._schedule = run.config, run.info, run.schedule
        self._index, self._process, self._console = index, process, console
        self._place: StageFolder = run.place(index)
        self._precision = check_precision(run.config, process)
        before = run.schedule.last_trained_before(index)
        plan = run.plan_of(before)
        self._tensors = SharedTensors(self._place.path, process)
        self._work = work_in(self._place.path / _WORK, run, process, console)
        left = left_by(run, before)
        self._owner = run.schedule.run_stages[index].owner
        self._form = left.state_of(self._owner)
        self._unsharded = run.build(torch.device("meta"), plan)
        self._sharded = shard_model(self._unsharded, run.config, process)
        load_weights(left.folder, self._sharded)
        self._norms = running_norms(self._sharded)
        self._batches: list[Batch] = []
        self._all_kept = False
        self._counts: dict[str, Tensor] | None = None
        self._progress, self.evaluations, self._seconds = self._read_progress()

    def run(self) -> StageResult:
        """Search to the end, or go on where an interrupted search was."""
        self._begun = time.perf_counter()
        now, owner = self._schedule.run_stages[self._index], self._owner
        stage = now.stage
        self._console.say(f"{stage.name}: {stage.purpose}")
        self._place.path.mkdir(parents=True, exist_ok=True)
        with self._work:
            result = owner.method.search(now.as_of(owner), owner.tables, self)
        self._tensors.release()
        if self._process.is_main:
            shutil.rmtree(self._place.path / _WORK)
        seconds = self._seconds_so_far()
        return StageResult(
            name=stage.name,
            stopped=f"{self.evaluations} evaluations",
            train_seconds=seconds,
            wall_seconds=seconds,
            result=without_nan(result),
        )

    @property
    def form(self) -> MethodState:
        """The form that the stage before left; rows are read by range."""
        return self._form

    @property
    def work(self) -> Work:
        """Does what is to be done for every block of rows, on all ranks together."""
        return self._work

    @property
    def combine(self) -> nn.Module:
        """The method's own `combine` inside the model that `evaluate` runs."""
        tables = self._unsharded.tables
        assert tables is not None
        assert isinstance(tables.combine, Combine)
        own = self._owner.names[0]
        for group in tables.groups:
            if own in [table.name for table in group.tables]:
                return tables.combine.combines[group.label]
        raise AssertionError("the method's tables are in no group")

    @property
    def counts(self) -> Mapping[str, Tensor]:
        """How often each id of each table occurs in the training rows."""
        if self._counts is None:
            folder = self._place.path / _WORK
            self._counts = counts_of(self._info, folder, self._work)
        return self._counts

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self._config.seed

    def shared(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Large tensors that the first rank makes and all ranks read."""
        return self._tensors.get(name, make)

    def evaluate(self, rows: int | None = None) -> float:
        """Score the model as it is now on search-validation rows; more is better."""
        self.evaluations += 1
        with self._precision():
            if self._norms:
                first = list(islice(self._first(rows), _REFITTED))
                refit(self._sharded, self._norms, first, self._process)
            found = evaluate_batches(self._sharded, self._first(rows), self._process)
        monitor = self._config.train.monitor
        value: float = metrics_record(found.metrics, found.weighted)[monitor]
        if math.isnan(value):
            raise EmbcompError(
                f"{monitor} of the search-validation rows is undefined; raise data.search_share or "
                "choose another train.monitor"
            )
        return -value if is_loss(monitor) else value

    def _first(self, rows: int | None) -> Iterator[Batch]:
        """The batches of the first so many rows, in whole batches; the same number on each rank.

        They are kept for the next candidate, unless all rows are asked for.
        """
        each = self._config.data.eval_batch_size
        wanted = 2**62 if rows is None else max(1, -(-rows // each))
        yield from self._batches[:wanted]
        if self._all_kept or len(self._batches) >= wanted:
            return
        loader = evaluation_batches(self._config, self._info, SEARCH, self._process)
        loader.load_state_dict(loader.state_dict(len(self._batches)))
        for batch in islice(loader, wanted - len(self._batches)):
            if rows is not None:
                self._batches.append(batch)
            yield batch
        self._all_kept = len(self._batches) == len(loader)

    def load(self) -> dict[str, Any] | None:
        """What `save` was last given, after an interruption; None at the beginning."""
        return self._progress

    def save(self, progress: Mapping[str, Any]) -> None:
        """Keep JSON values that the search can go on from, and what it has cost so far."""
        if self._process.is_main:
            content = {
                "search": progress,
                "evaluations": self.evaluations,
                "seconds": self._seconds_so_far(),
            }
            write_atomically(self._place.progress, sealed_json(content))

    def _seconds_so_far(self) -> float:
        """Time of the search, interruptions left out."""
        return self._seconds + time.perf_counter() - self._begun

    def _read_progress(self) -> tuple[dict[str, Any] | None, int, float]:
        """What was saved last, and the evaluations and seconds until then."""
        if not self._place.progress.exists():
            return None, 0, 0.0
        content = read_sealed_json(self._place.progress)
        return content["search"], content["evaluations"], content["seconds"]

    def say(self, text: str) -> None:
        """A line for people."""
        self._console.say(text)
