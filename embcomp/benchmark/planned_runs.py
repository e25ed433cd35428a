"""Trainings known by what they are: equal ones have one number, and are trained once.

A number is a digest of the whole config but for its name, of the dataset and of what the run is for. So
a benchmark that goes on, with more methods, budgets or seeds than it began with, keeps what it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from embcomp.benchmark.cells import Cell, PreparedBenchmark
from embcomp.config.train_config import TrainConfig
from embcomp.io.digests import sha256_of_json
from embcomp.search.config.search_sections import FidelityConfig
from embcomp.search.space.recipes import shortened

Kind = Literal["tuning", "final"]
Tuned = Mapping[str, float | int]
BITS = 48
"""Of a run's number: what an Optuna study stores exactly, whatever its storage."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training of a benchmark.

    Args:
        kind: whether it tunes or counts.
        cell: what it is a run of.
        tuned: its learning rates and the place of its settings.
        seed: its seed.
        config: the run.
        digest: its config, dataset and kind, as hexadecimal digits.
    """

    kind: Kind
    cell: Cell
    tuned: Tuned
    seed: int
    config: TrainConfig
    digest: str

    @property
    def number(self) -> int:
        """What its trial is known by."""
        return int(self.digest, 16)

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.config.name

    @property
    def label(self) -> str:
        """The run for people."""
        rates = f"rates {self.tuned['row']:g} and {self.tuned['dense']:g}"
        settings = self.cell.combinations[int(self.tuned["settings"])]
        shown = "".join(f", {key}={value}" for key, value in settings.items())
        return f"{self.cell.label}, {rates}{shown}, seed {self.seed}"


def tuning_run(
    prepared: PreparedBenchmark, cell: Cell, tuned: Tuned, *, view: str, dataset: str
) -> PlannedRun:
    """A trial that tunes: on the view without test data, for as long as the fidelity says.

    Args:
        prepared: the benchmark.
        cell: what it is a trial of.
        tuned: what is tried.
        view: folder of the dataset's view.
        dataset: its digest.
    """
    config, on_cpu = prepared.config, prepared.config.processes.devices == "cpu"
    run = cell.run(tuned, seed=config.seed, name="run")
    if not is_shortened(config.fidelity):
        changes: dict[str, Any] = {"monitor": config.quality, "keep_checkpoints": 1}
        changes |= {"device": "cpu"} if on_cpu else {}
        run = run.model_copy(update={"train": run.train.model_copy(update=changes)}).with_data(view)
    else:
        run = shortened(run, view, config.quality, config.fidelity, on_cpu=on_cpu)
    rows = config.fidelity.valid_rows
    return _planned("tuning", cell, tuned, config.seed, run, f"{dataset} {rows}")


def final_run(
    prepared: PreparedBenchmark, cell: Cell, tuned: Tuned, seed: int, *, dataset: str
) -> PlannedRun:
    """A run that counts: the recipe in full, and the test split at its end."""
    run = cell.run(tuned, seed=seed, name="run")
    changes: dict[str, Any] = {"keep_checkpoints": 1}
    if prepared.config.processes.devices == "cpu":
        changes["device"] = "cpu"
    run = run.model_copy(update={"train": run.train.model_copy(update=changes)})
    return _planned("final", cell, tuned, seed, run, dataset)


def _planned(
    kind: Kind, cell: Cell, tuned: Tuned, seed: int, run: TrainConfig, dataset: str
) -> PlannedRun:
    digest = config_digest(run, dataset, kind)
    name = f"{cell.slug}-{seed}-{digest}"
    named = run.model_copy(update={"name": name})
    return PlannedRun(kind=kind, cell=cell, tuned=tuned, seed=seed, config=named, digest=digest)


def config_digest(run: TrainConfig, dataset: str, kind: Kind) -> str:
    """What a training is, wherever its dataset lies and whatever it is called.

    Args:
        run: the training.
        dataset: what tells its dataset from others.
        kind: what it is for.
    """
    document = run.model_dump(mode="json")
    del document["name"]
    del document["data"]["path"]
    whole = sha256_of_json({"run": document, "dataset": dataset, "kind": kind})
    return whole[: BITS // 4]


def without_repeats(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Each training once, in order."""
    return list({run.number: run for run in runs}.values())


def is_shortened(fidelity: FidelityConfig) -> bool:
    """Whether trials that tune get less training than final runs."""
    return fidelity.max_steps is not None or fidelity.epochs is not None
