"""The training loop, the same for one process and for many.

A step is counted, recorded, evaluated and checkpointed in an order that depends on the config alone,
so that a run that was killed at any step and started again ends as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embcomp.backends.full import wait_for_checks
from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.config.train_config import is_loss
from embcomp.data_pipelines.loader.batch import Batch
from embcomp.data_pipelines.loader.parquet_loader import STATE_VERSION, ParquetLoader
from embcomp.training.build import (
    TASK_PREFIX,
    check_precision,
    loss_of,
    shard_model,
)
from embcomp.training.checkpoint import (
    checkpoint_folder,
    load_checkpoint,
    load_weights,
    read_state,
    remove_old,
    save_checkpoint,
    saved_steps,
)
from embcomp.training.data import (
    check_last_batch,
    endless,
    evaluation_batches,
    far_column,
    has_rows,
    loss_scale,
    rows_trained,
    search_batches,
    training_batches,
)
from embcomp.training.distributed.process import Process
from embcomp.training.loop_state import LoopState
from embcomp.training.optim.lazy_decay import LazyDecay
from embcomp.training.optim.optimizers import Learners, Optimizers, Phase, StructureLearner
from embcomp.training.reporting.console import RunConsole
from embcomp.training.reporting.evaluation import Evaluation, evaluate_batches
from embcomp.training.reporting.kept_rows import kept_rows
from embcomp.training.reporting.logs import RunLogs
from embcomp.training.reporting.loss_record import LossRecord
from embcomp.training.reporting.report import Report, as_record
from embcomp.training.reporting.stage_result import StageResult, write_outcome
from embcomp.training.second_order import UnrolledSteps
from embcomp.training.served_rows import round_rows, served_types
from embcomp.training.stages.left_model import path_of
from embcomp.training.stages.run_context import RunContext
from embcomp.training.stages.start_files import load_optimizer_start, load_start
from embcomp.training.stages.warm_start import WarmStart
from embcomp.training.steps import PipelinedSteps, PlainSteps, Steps, Updates


class Training:
    """One stage of a run, from its first, or its next, step to its end.

    What is made goes on from the stage's latest checkpoint, or begins with what was handed to it.

    Args:
        run: the run, whose folder has been created.
        index: the place of the stage among its stages.
        process: the process group.
        console: what a person sees.
        log_sizes: bytes of the run's logs when the stage began.
    """

    def __init__(
        self,
        run: RunContext,
        index: int,
        process: Process,
        console: RunConsole,
        log_sizes: Mapping[str, int],
    ) -> None:
        config = self.config = run.config
        self.info, self.folder, self.process = run.info, run.folder, process
        self._scores = run.scores
        self.setup, self.console = run.setup(index), console
        stage = self.stage = self.setup.stage
        self.checkpoints = self.setup.folder.checkpoints
        self.precision = check_precision(config, process)
        self.batches = training_batches(config, self.info, process, holds_out=stage.holds_out)
        self.unsharded = run.build(torch.device("meta"), self.setup.plan)
        check_last_batch(self.unsharded.model, self.batches, process.world_size)
        self.sharded = shard_model(self.unsharded, config, process)
        self.optimizers = Optimizers(self.sharded, config.train, self._learners())
        rows = config.train.row_optimizer
        self.fused_rows = not self.optimizers.rows
        lazy = rows.weight_decay > 0 and self.fused_rows and stage.rows
        self.decay = LazyDecay(self.sharded, rows.weight_decay) if lazy else None
        self.updates = Updates(self.optimizers, self.decay)
        self.steps = make_steps(self, pipelined=process.device.type == "cuda")
        self.total_steps = self._planned_steps()
        if self.unsharded.tables is not None:
            self.unsharded.tables.plan_steps(self.total_steps)
        # Dropout draws other numbers on each rank.
        torch.manual_seed(config.seed * 65537 + process.rank)
        self.state = LoopState(row_order=STATE_VERSION, log_sizes=dict(log_sizes))
        self.warm_start = WarmStart.read(run) if config.train.warm_start is not None else None
        self._resumed = self._begin()
        self.started = time.perf_counter() - self.state.wall_seconds
        self._losses = LossRecord(
            self.state,
            process,
            lambda: far_column(self.batches, self.state.step_in_epoch),
        )
        self.logs = RunLogs(
            self.folder,
            enabled=process.is_main,
            step=self.state.step,
            sizes=self.state.log_sizes,
            stage=self.setup.label,
        )
        self._search_loader: ParquetLoader | None = None
        self._search_batches: Iterator[Batch] = iter(())
        if stage.alternate:
            self._search_loader = search_batches(config, self.info, process)
            self._search_batches = endless(self._search_loader, self.state.step)

    def _learners(self) -> Learners:
        tables, setup = self.unsharded.tables, self.setup
        if tables is None:
            return Learners(stage=self.stage)
        path = TASK_PREFIX + path_of(self.unsharded.model, tables)
        return Learners(
            stage=self.stage,
            structures=[
                StructureLearner(
                    prefix=setup.structure_prefix(group, path),
                    make=partial(group.method.structure_optimizer, setup.own_stage(group)),
                )
                for group in setup.owners
            ],
            waiting=[setup.structure_prefix(group, path) for group in setup.waiting],
        )

    def _planned_steps(self) -> int:
        epochs = self.config.train.epochs if self.stage.epochs is None else self.stage.epochs
        bounds = (self.config.train.max_steps, self.stage.max_steps)
        return min(
            epochs * len(self.batches), *(bound for bound in bounds if bound is not None), 2**62
        )

    def train(self) -> None:
        """Train the stage to its end; `finish` or `hand_on` go on from there."""
        self.console.start(self.total_steps, self.state.step, stage=self.setup.label)
        nothing_to_train = self.total_steps == 0 and not self.state.stopped
        if nothing_to_train:
            self.state.stopped = "nothing to train"
        if nothing_to_train or (self.stage.keeps == "best_or_start" and not self._resumed):
            self._validate()
            self._save()
        while not self.state.stopped:
            self._train_epoch()

    def _train_epoch(self) -> None:
        """The rest of the current epoch, or less where the stage ends."""
        state, train = self.state, self.config.train
        self.batches.set_epoch(state.epoch)
        batches: Iterator[Batch] = iter(self.batches)
        if self.stage.alternate:
            batches = _alternating(batches, self._search_batches)
        end_of_epoch = False
        while not (end_of_epoch or state.stopped):
            self._train_step(batches)
            end_of_epoch = state.step_in_epoch == len(self.batches)
            if end_of_epoch:
                state.epoch, state.step_in_epoch = state.epoch + 1, 0
                self._record_kept_rows()
            if state.step == self.total_steps:
                state.stopped = f"{state.step} steps done"
            evaluate = _is_due(train.eval_every, state.step) or bool(state.stopped)
            if train.eval_every is None:
                evaluate = evaluate or end_of_epoch
            if _is_due(train.log_every, state.step) or evaluate:
                self._record_loss()
            if evaluate:
                self._validate()
            if evaluate or end_of_epoch or _is_due(train.checkpoint_every, state.step):
                self._save()

    def _train_step(self, batches: Iterator[Batch]) -> None:
        state, begun = self.state, time.perf_counter()
        self.updates.step_number, self.updates.reductions = state.step, state.reductions
        scale = loss_scale(self.batches, state.step_in_epoch, self.process.world_size)
        self.sharded.train()
        self._losses.add(self._phase("train", scale, batches))
        if self._search_loader is not None:
            step = state.step % len(self._search_loader)
            scale = loss_scale(self._search_loader, step, self.process.world_size)
            self._phase("search", scale, batches)
        state.step += 1
        state.step_in_epoch += 1
        state.train_seconds += time.perf_counter() - begun
        self.console.step(state.step)

    def _phase(self, phase: Phase, scale: float, batches: Iterator[Batch]) -> Tensor:
        """One forward and backward pass with its update."""
        self.updates.phase = phase
        loss_of(self.sharded).scale = scale
        if self.unsharded.tables is not None and self.fused_rows:
            # Elsewhere rows rest by having their gradients dropped.
            self.unsharded.tables.detach_rows(phase == "search" or not self.stage.rows)
        return self.steps.run(batches)

    def _record_loss(self) -> None:
        """Logs the mean loss of all ranks since the last record."""
        recorded = self._losses.take(self.config.data.batch_size)
        if recorded is None:
            return
        loss, speed = recorded
        self.logs.metrics("train", self.state.step, {"loss": loss})
        self.logs.timing(self.state.step, {"train_rows_per_second": speed})
        self.console.loss(self.state.step, loss, speed)

    def _record_kept_rows(self) -> None:
        """Logs the share of rows that a method's thresholds let pass, where it has some."""
        tables = self.unsharded.tables
        if tables is None or not tables.may_stop_rows:
            return
        self.settle()
        resting = [name for group in self.setup.waiting for name in group.names]
        kept = kept_rows(self.sharded, tables, self.process.device, resting)
        if kept is None:
            return
        self.state.kept_rows.append(kept)
        self.logs.metrics("structure", self.state.step, {"kept_rows": kept})
        self.console.say(f"{self._place}: {kept:.1%} of rows pass their thresholds")

    def _validate(self) -> None:
        """Evaluate the validation split: best step, learning rates, early stop."""
        state, train = self.state, self.config.train
        record = as_record(self._evaluate("valid"))
        self.logs.metrics("valid", state.step, record)
        value = record[train.monitor]
        if value is not None and is_loss(train.monitor):
            value = -value
        if state.see(value, record, train.min_delta):
            return
        if train.plateau is not None:
            state.reductions += 1
        if train.early_stop is not None and state.stalled >= train.early_stop.patience:
            what = "has not improved" if value is not None else "was undefined, or not better,"
            state.stopped = f"{train.monitor} {what} in {state.stalled} evaluations"

    def _evaluate(self, split: str, scores: Path | None = None) -> Evaluation:
        self.settle()
        batches = evaluation_batches(self.config, self.info, split, self.process)
        with self.precision():
            evaluation = evaluate_batches(self.sharded, batches, self.process, keep=scores)
        self.console.evaluation(split, self.state.step, evaluation)
        return evaluation

    @torch.no_grad()
    def settle(self) -> None:
        """Finish what training does late, or on each rank by itself, before anyone reads it."""
        self.steps.pause()
        wait_for_checks(self.unsharded.model)
        for module in self.sharded.modules():
            if isinstance(module, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection):
                module.settle()
        if self.decay is not None:
            self.decay.flush()
        if self.process.world_size > 1:
            for module in self.sharded.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    for statistic in (module.running_mean, module.running_var):
                        if statistic is not None:
                            dist.all_reduce(statistic)
                            statistic /= self.process.world_size

    def _save(self) -> None:
        state = self.state
        self.settle()
        self._losses.share()
        state.wall_seconds = time.perf_counter() - self.started
        state.log_sizes = self.logs.sizes()
        save_checkpoint(
            self.checkpoints,
            state.step,
            self.sharded,
            self.optimizers.combined,
            dataclasses.asdict(state),
            self.process,
        )
        self._remove_old()

    def _remove_old(self) -> None:
        if self.process.is_main:
            keep = self.config.train.keep_checkpoints
            remove_old(self.checkpoints, keep, self.state.best_step)

    def _begin(self) -> bool:
        """Go on from the stage's latest checkpoint, or begin with what was handed to it.

        Returns:
            Whether there was a checkpoint.
        """
        steps = saved_steps(self.checkpoints)
        if self.warm_start is not None:
            self.optimizers.begin_after(self.warm_start.steps)
        if not steps:
            if self.warm_start is not None or self.setup.index > self.setup.schedule.trained[0]:
                load_start(self.setup.folder.start, self.sharded, checks=self.process.is_main)
            if self.warm_start is not None:
                load_optimizer_start(
                    self.setup.folder.start_optimizer,
                    self.optimizers.combined,
                    checks=self.process.is_main,
                )
            return False
        folder = checkpoint_folder(self.checkpoints, steps[-1])
        saved = read_state(folder)
        ranks = saved.pop("world_size")
        self.state = LoopState(**saved)
        load_checkpoint(folder, self.sharded, self.optimizers.combined, self.process)
        self.batches.set_epoch(self.state.epoch)
        self.batches.load_state_dict(self.batches.state_dict(self.state.step_in_epoch))
        self._remove_old()  # which a kill may have kept from happening
        self.console.say(f"{self._place}: goes on from step {self.state.step}")
        if ranks != self.process.world_size:
            self.console.say(
                f"that was on {ranks} rank(s), this is on {self.process.world_size}: rows come as they "
                "would have, but from here random numbers of dropout differ"
            )
        if self.state.row_order != STATE_VERSION:
            if self.state.step_in_epoch:
                self.console.say(
                    "an earlier version drew another order of rows: the rest of this epoch sees some "
                    "rows twice and others not at all"
                )
            self.state.row_order = STATE_VERSION
        return True

    @property
    def _place(self) -> str:
        """The run, and the stage where there are several."""
        label = self.setup.label
        return f"{self.folder.path}, {label}" if label else str(self.folder.path)

    @property
    def kept_step(self) -> int:
        """The step whose weights the stage leaves."""
        best = self.state.best_step
        return self.state.step if best is None or self.stage.keeps == "last" else best

    def hand_on(self) -> None:
        """Write down that the stage is finished and what it leaves."""
        state, result = self.state, StageResult.of(self.stage, self.state, self.kept_step)
        self.logs.close()
        dist.barrier()
        if self.process.is_main:
            write_outcome(self.setup.folder, result, state.log_sizes)
        dist.barrier()
        if result.verdict:
            self.console.say(f"{self.folder.path}: {result.verdict}")
        self.console.say(f"{self._place}: {state.stopped}; hands on step {self.kept_step}")

    def finish(self, before: Sequence[StageResult]) -> Report:
        """Evaluate the weights that the last stage leaves on the test split and reports.

        Where rows are served in narrow types, what is evaluated and reported has such rows.

        Args:
            before: what earlier stages ended with.
        """
        state, config, best = self.state, self.config, self.kept_step
        self.steps.pause()
        load_weights(checkpoint_folder(self.checkpoints, best), self.sharded)
        test, valid, types = None, state.best_valid, served_types(config, self.info)
        if not types.are_fp32:
            round_rows(self.sharded.state_dict(), self.unsharded, types)
            valid = as_record(self._evaluate("valid"))
        if has_rows(self.info, "test"):
            test = as_record(self._evaluate("test", scores=self._scores))
            self.logs.metrics("test", best, test)
        self.logs.close()
        state.wall_seconds = time.perf_counter() - self.started
        last = StageResult.of(self.stage, state, best)
        if self.warm_start is not None:
            last = dataclasses.replace(last, result={"warm_start": self.warm_start.as_json()})
        report = Report.of(
            config,
            self.info,
            self.unsharded,
            self.process,
            state,
            stages=[*before, last],
            best_step=best,
            valid=valid,
            test=test,
            dense_parameters=sum(weight.numel() for weight in self.optimizers.dense),
            rows=rows_trained(self.batches, state.epoch, state.step_in_epoch, self.process),
        )
        dist.barrier()
        if self.process.is_main:
            report.save(self.folder.path)
        dist.barrier()
        if last.verdict and self.setup.label:
            self.console.say(f"{self.folder.path}: {last.verdict}")
        self.console.say(f"{self.folder.path}: {state.stopped}; best at step {best}")
        return report


def _alternating(training: Iterator[Batch], searching: Iterator[Batch]) -> Iterator[Batch]:
    """A batch of training rows, one of search-validation rows, and so on."""
    for batch in training:
        yield batch
        yield next(searching)


def make_steps(training: Training, *, pipelined: bool) -> Steps:
    """The way to run a step; overlapping pays where copies and kernels run side by side."""
    if training.stage.second_order:
        return UnrolledSteps(
            training.sharded,
            training.updates,
            training.process,
            training.precision,
            training.optimizers,
            training.config.train.row_optimizer,
        )
    kind = PipelinedSteps if pipelined else PlainSteps
    return kind(training.sharded, training.updates, training.process, training.precision)


def _is_due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
