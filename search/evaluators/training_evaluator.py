"""Scores candidates by training them, each in a process of its own (or one per rank)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from typing_extensions import override

from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError
from embcomp.io.atomic_files import write_atomically
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.config.search_sections import FidelityConfig, ProcessesConfig
from embcomp.search.evaluators.base import Evaluator, Rung, Task, TrialHandle, TrialResult
from embcomp.search.evaluators.dataset_view import write_view
from embcomp.search.evaluators.trial_process import (
    FAILURE_FILE,
    LATENCY_FILE,
    MEASURED_FILE,
    PARENT,
)
from embcomp.search.evaluators.trial_pruning import rung_steps
from embcomp.search.space.recipes import full_config, trial_config
from embcomp.search.space.space import Space
from embcomp.search.space.staged_methods import staged_methods
from embcomp.training.reporting.report import Report

_PATIENCE = 10.0  # seconds between asking a process to end and making it


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What one running candidate may use.

    Args:
        devices: CUDA devices, one for each rank; empty on CPU.
        threads: CPU threads of a rank.
    """

    devices: tuple[int, ...]
    threads: int


def make_slots(trials: ProcessesConfig, num_devices: int, *, key: str = "trials") -> list[Slot]:
    """Share a machine out to candidates.

    Args:
        trials: how they are run.
        num_devices: CUDA devices that there are.
        key: what the YAML calls it.

    Raises:
        ConfigError: when a candidate needs more devices than there are.
    """
    cores = os.cpu_count() or 1
    devices: Sequence[int] = ()
    if trials.devices == "auto":
        devices = range(num_devices)
    elif trials.devices != "cpu":
        devices = trials.devices
        wrong = [number for number in devices if number >= num_devices]
        if wrong:
            raise ConfigError(
                f"{key}.devices: there is no CUDA device {wrong[0]}; there are {num_devices}"
            )
    if not devices:
        count = trials.parallel or 1
        threads = trials.threads or max(1, cores // (count * trials.world_size))
        return [Slot(devices=(), threads=threads) for _ in range(count)]
    each = trials.world_size
    most = len(devices) // each
    if most < (trials.parallel or 1):
        raise ConfigError(
            f"{key}: {trials.parallel or 1} candidate(s) at once on {each} device(s) each need "
            f"more than the {len(devices)} CUDA device(s) here; lower parallel or world_size, or "
            f"set {key}.devices=cpu"
        )
    count = trials.parallel or most
    threads = trials.threads or max(1, cores // (count * each))
    return [
        Slot(devices=tuple(devices[i * each : (i + 1) * each]), threads=threads)
        for i in range(count)
    ]


def full_steps(base: TrainConfig, info: DatasetInfo) -> int:
    """Steps of a recipe's training in full, of a method with one stage."""
    steps = base.train.epochs * _steps_per_epoch(base, info.split("train").rows)
    return min(steps, base.train.max_steps or sys.maxsize)


def search_steps(
    fidelity: FidelityConfig, base: TrainConfig, info: DatasetInfo, rows: int | None = None
) -> int:
    """Steps that a fidelity leaves of it.

    Args:
        fidelity: how much training there is.
        base: the recipe.
        info: the dataset.
        rows: training rows; None takes all.
    """
    each = _steps_per_epoch(base, info.split("train").rows if rows is None else rows)
    epochs = min(fidelity.epochs or base.train.epochs, base.train.epochs)
    bounds = (fidelity.max_steps, base.train.max_steps)
    return min(epochs * each, *(bound or sys.maxsize for bound in bounds))


def _steps_per_epoch(base: TrainConfig, rows: int) -> int:
    batch = base.data.batch_size
    return max(1, rows // batch if base.data.drop_last else -(-rows // batch))


class TrainingEvaluator(Evaluator):
    """Trains each candidate, with the recipe's own settings.

    In a search that is for as long as its fidelity says, on a view of the dataset without test data;
    in full it is an ordinary run, whose folder stays whole, and whose test metrics are in the
    outcome's details.

    Args:
        config: the search.
        space: its space.
        folder: the search's folder.
        slots: what running candidates may use.
        in_full: whether candidates are retrained rather than tried.
    """

    def __init__(
        self,
        config: SearchConfig,
        space: Space,
        folder: Path,
        slots: Sequence[Slot],
        *,
        in_full: bool = False,
    ) -> None:
        self._config, self._space, self._slots = config, space, list(slots)
        self._in_full, self._view = in_full, folder / "data"
        self._runs = folder / ("finals" if in_full else "trials")
        self._running: list[TrainingRun] = []
        self.slots = len(self._slots)
        info = DatasetInfo.load(space.base.data.path)
        self.full_steps = full_steps(space.base, info)
        self.steps = self.full_steps if in_full else search_steps(config.fidelity, space.base, info)
        rows = info.split("valid").rows
        scored = rows if in_full else min(config.fidelity.valid_rows or rows, rows)
        each = " in each stage" if staged_methods(space) else ""
        self.fidelity = (
            f"{self.steps:,} of {self.full_steps:,} training steps{each}, scored on {scored:,} of "
            f"{rows:,} validation rows"
        )
        self.rungs = [] if in_full else rung_steps(config.fidelity.rungs, self.steps)

    @override
    def prepare(self) -> None:
        if not self._in_full:
            write_view(self._space.base.data.path, self._view, self._config.fidelity.valid_rows)
        self._runs.mkdir(parents=True, exist_ok=True)

    def run_config(self, task: Task) -> TrainConfig:
        """A candidate's run."""
        search, space, name = self._config, self._space, f"trial-{task.number:04d}"
        if task.seed is not None:
            name += f"_seed-{task.seed}"
        if self._in_full:
            return full_config(search, space, task.candidate, name, task.seed)
        view = str(self._view.resolve())
        return trial_config(search, space, task.candidate, name, view, task.seed)

    @override
    def start(self, task: Task) -> TrainingRun:
        config, tried = self.run_config(task), not self._in_full
        path = self._runs / f"{config.name}.yaml"
        write_atomically(path, config.to_yaml())
        run = TrainingRun(
            config_path=path,
            name=config.name,
            runs=self._runs,
            slot=self._slots[task.slot],
            quality=self._config.quality,
            rungs=self.rungs,
            latency=tried and "latency" in self._config.objectives,
            world_size=self._config.trials.world_size,
            timeout=self._config.trials.timeout if tried else None,
            clean=tried,
        )
        self._running = [other for other in self._running if other.is_running] + [run]
        return run

    @override
    def close(self) -> None:
        for run in self._running:
            if run.is_running:
                run.detach()


class TrainingRun(TrialHandle):
    """One candidate's process.

    Args:
        config_path: its config.
        name: its run's name.
        runs: the folder of all candidates' runs.
        slot: what it may use.
        quality: the metric.
        rungs: steps at which scores on the way are handed out.
        latency: whether look-ups are timed.
        scored: whether the scores of test rows are kept, and what serving takes is measured.
        world_size: ranks.
        timeout: seconds that it may take.
        clean: whether checkpoints are removed at the end.
    """

    def __init__(
        self,
        *,
        config_path: Path,
        name: str,
        runs: Path,
        slot: Slot,
        quality: str,
        rungs: Sequence[int] = (),
        latency: bool = False,
        scored: bool = False,
        world_size: int = 1,
        timeout: float | None = None,
        clean: bool = True,
    ) -> None:
        self.folder, self.log = runs / name, runs / f"{name}.log"
        self._failure = runs / f"{name}.{FAILURE_FILE}"
        self._failure.unlink(missing_ok=True)
        self._quality, self._rungs, self._latency = quality, list(rungs), latency
        self._scored, self._timeout, self._clean = scored, timeout, clean
        self._begun = time.monotonic()
        self._handed: set[int] = set()
        self._stopped = False
        arguments = (
            [str(config_path), "--runs", str(runs)]
            + ["--latency"] * latency
            + ["--scored"] * scored
        )
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_launcher(world_size), *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(slot),
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    @override
    def poll(self) -> TrialResult | None:
        status = self._process.poll()
        seconds = time.monotonic() - self._begun
        if status is None:
            if self._timeout is None or seconds <= self._timeout:
                return None
            self._end()
            return self._failed("timed out", f"still running after {seconds:.0f} s", seconds)
        if status != 0:
            return self._failed(*self._reason(status), seconds)
        report = Report.load(self.folder)
        value = report.valid.get(self._quality)
        if value is None:
            message = f"{self._quality} is undefined on the validation rows"
            return self._failed("no metric", message, seconds)
        self._clean_up()
        details: dict[str, Any] = {"valid": _numbers(report.valid), "best_step": report.best_step}
        if report.test is not None:
            details |= {"test": _numbers(report.test), "full_bytes": report.full_bytes}
        if self._scored:
            details |= {"report": report_figures(report)}
            details |= json.loads((self.folder / MEASURED_FILE).read_text(encoding="utf-8"))
        return TrialResult(
            quality=float(value),
            latency=self._read_latency(),
            seconds=report.wall_seconds,
            steps=report.steps,
            details=details,
        )

    @override
    def rungs(self) -> list[Rung]:
        found = []
        for record in _records(self.folder / "metrics.jsonl"):
            step, value = int(record["step"]), record.get(self._quality)
            is_rung = record["kind"] == "valid" and step in self._rungs
            if is_rung and step not in self._handed and value is not None:
                self._handed.add(step)
                found.append(Rung(step=step, quality=float(value)))
        return found

    @override
    def stop(self) -> TrialResult:
        self._end()
        self._clean_up()
        steps = max((r["step"] for r in _records(self.folder / "metrics.jsonl")), default=0)
        return TrialResult(seconds=time.monotonic() - self._begun, steps=steps)

    @override
    def detach(self) -> None:
        self._end()

    def _end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_PATIENCE)
        # A launcher that is killed may leave its ranks.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _failed(self, kind: str, message: str, seconds: float) -> TrialResult:
        self._clean_up()
        return TrialResult(failure=kind, message=message, seconds=seconds)

    def _reason(self, status: int) -> tuple[str, str]:
        if self._failure.exists():
            failure = json.loads(self._failure.read_text(encoding="utf-8"))
            return failure["kind"], failure["message"]
        if status < 0:
            name = signal.Signals(-status).name
            hint = "; the system may have been out of memory" if name == "SIGKILL" else ""
            return "killed", f"the process was ended by {name}{hint}"
        return "error", f"the process ended with status {status}"

    def _read_latency(self) -> float | None:
        if not self._latency:
            return None
        content = json.loads((self.folder / LATENCY_FILE).read_text(encoding="utf-8"))
        return float(content["microseconds"])

    def _clean_up(self) -> None:
        if self._clean:
            for name in ("checkpoints", "stages"):
                shutil.rmtree(self.folder / name, ignore_errors=True)


def _launcher(world_size: int) -> list[str]:
    module = ["-m", "embcomp.search.evaluators.trial_process"]
    if world_size == 1:
        return [sys.executable, *module]
    # The launcher holds the port on which ranks meet. Without an address, they would ask for this
    # machine by its host name, which need not resolve.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    here = ["--local-addr", "127.0.0.1", "--nproc-per-node", str(world_size)]
    return [*torchrun, *here, *module]


def _environment(slot: Slot) -> dict[str, str]:
    own = psutil.Process()
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    environment |= {
        PARENT: f"{own.pid}:{own.create_time():.0f}",
        "OMP_NUM_THREADS": str(slot.threads),
    }
    if slot.devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else []
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(
            names[number] if names else str(number) for number in slot.devices
        )
    return environment


def report_figures(report: Report) -> dict[str, int | float]:
    """What a run took and its tables take, of its report."""
    return {
        "serve_bytes": report.serve_bytes,
        "full_bytes": report.full_bytes,
        "first_order_bytes": report.first_order_bytes,
        "train_bytes": report.train_bytes,
        "dense_parameters": report.dense_parameters,
        "train_seconds": report.train_seconds,
        "wall_seconds": report.wall_seconds,
        "rows_per_second": report.samples_per_second,
        "world_size": report.world_size,
    }


def _records(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's records."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}
