"""What the command line and other programs call: run a benchmark, and read what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna

from embcomp.benchmark.benchmark_config import REFERENCES, BenchmarkConfig
from embcomp.benchmark.benchmark_progress import BenchmarkConsole
from embcomp.benchmark.benchmark_result import BenchmarkResult, CellKey, summarise
from embcomp.benchmark.benchmark_run import BenchmarkOutcome, BenchmarkRun, FinalRun
from embcomp.benchmark.cells import Cell, PreparedBenchmark, prepare_benchmark
from embcomp.benchmark.ledger import LEDGER_FILE, Entry, append_entries, entry_of, task_of
from embcomp.benchmark.seed_halving import Standing, difference
from embcomp.benchmark.significance import PairedDifference
from embcomp.benchmark.tuning import best_of
from embcomp.errors import ConfigError
from embcomp.search.api import cuda_devices
from embcomp.search.evaluators.training_evaluator import make_slots
from embcomp.search.trials.storage import explained, open_storage

BENCHMARKS = "comparisons"
"""Folder of all benchmarks, where nobody says otherwise."""


def benchmark(
    config: BenchmarkConfig,
    *,
    folder: str | Path = BENCHMARKS,
    ledger: str | Path | None = None,
    hours: float | None = None,
    quiet: bool = False,
) -> BenchmarkResult:
    """Run a benchmark, join one that goes on, or go on with one that was interrupted.

    Args:
        config: the benchmark, from `embcomp.benchmark.load_benchmark`.
        folder: the folder of all benchmarks; this one's is `<folder>/<config.name>`.
        ledger: the ledger to append to; by default `ledger.jsonl` in the benchmark's folder.
        hours: what it may take on this machine, as many trainings at once as it runs here; None trains
            every seed of every method. A later call with more hours goes on.
        quiet: whether to print nothing.

    Raises:
        EmbcompError: Bad input of any kind, before anything is trained.
        StorageError: The studies' storage cannot be used; finished trainings are kept.
    """
    if hours is not None and not 0 < hours < 1e6:
        raise ConfigError(f"hours: expected a positive number, got {hours:g}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    slots = make_slots(config.processes, cuda_devices(), key="processes")
    prepared = prepare_benchmark(config)
    home = Path(folder) / config.name
    home.mkdir(parents=True, exist_ok=True)
    book = home / LEDGER_FILE if ledger is None else Path(ledger)
    storage = open_storage(config.storage, home)
    with explained(config.storage, home), BenchmarkConsole(enabled=not quiet) as console:
        for note in prepared.notes:
            console.log(f"left out: {note}")
        run = BenchmarkRun(prepared, home, storage, console, slots, hours)
        outcome = run.train()
        entries = append_entries(book, _entries(prepared, outcome, run.dataset))
        place = f"{run.dataset} {task_of(prepared)}"
        against = _against(run, prepared, outcome, place)
    result = _result(prepared, outcome, entries, against, place)
    result.save(home)
    from embcomp.benchmark.benchmark_page import write_benchmark_page
    from embcomp.benchmark.benchmark_picture import write_markdown, write_pictures

    write_benchmark_page(result, home / "benchmark.html")
    write_pictures(result, home)
    write_markdown(result, home / "benchmark.md")
    return result


def _entries(prepared: PreparedBenchmark, outcome: BenchmarkOutcome, dataset: str) -> list[Entry]:
    tried = dict(zip((id(cell) for cell in prepared.cells), outcome.tried))
    found = []
    for final in outcome.finals:
        if final.outcome.quality is None:
            continue
        past = tried[id(final.run.cell)]
        best = best_of(prepared.config, past)
        found.append(
            entry_of(
                prepared,
                final.run,
                final.outcome,
                trials=len(past),
                tuned_quality=None if best is None else best.quality,
                dataset=dataset,
            )
        )
    return found


def _against(
    run: BenchmarkRun, prepared: PreparedBenchmark, outcome: BenchmarkOutcome, place: str
) -> dict[CellKey, dict[str, PairedDifference]]:
    """Each cell against full tables, and against hashed ones in the same bytes."""
    resamples, seed = prepared.config.resamples, prepared.config.seed
    standings = run.standings(prepared.cells, outcome.finals, resamples=resamples)
    found: dict[CellKey, dict[str, PairedDifference]] = {}
    for one in standings:
        for other in _references(one, standings):
            compared = difference(one, other, seed=seed)
            if compared is not None:
                found.setdefault(_key(one.cell, place), {})[other.cell.method] = compared
    return found


def _references(one: Standing, standings: Sequence[Standing]) -> list[Standing]:
    return [
        other
        for other in standings
        if other.cell.method in REFERENCES
        and other is not one
        and other.cell.model == one.cell.model
        and other.cell.budget in (None, one.cell.budget)
    ]


def _key(cell: Cell, place: str) -> CellKey:
    return place, cell.model, cell.method, cell.budget


def _result(
    prepared: PreparedBenchmark,
    outcome: BenchmarkOutcome,
    entries: Sequence[Entry],
    against: Mapping[CellKey, Mapping[str, PairedDifference]],
    place: str,
) -> BenchmarkResult:
    config = prepared.config
    failures: dict[CellKey, list[str]] = {}
    for final in outcome.finals:
        if final.outcome.quality is None:
            failures.setdefault(_key(final.run.cell, place), []).append(_failure(final))
    notes = [*prepared.notes, *outcome.cut_short]
    for cell, tried in zip(prepared.cells, outcome.tried):
        if best_of(config, tried) is None:
            why = tried[0].failure if tried else "no trial was made"
            notes.append(f"{cell.label}: every trial failed; the first: {why}")
    notes += [f"{cell.label} got fewer seeds: it was certainly behind" for cell in outcome.losers]
    notes += [f"{_shown(key)}: {why}" for key, each in failures.items() for why in each]
    seconds = sum(each.seconds for tried in outcome.tried for each in tried)
    seconds += sum(final.outcome.seconds for final in outcome.finals)
    return BenchmarkResult(
        name=config.name,
        quality=config.quality,
        trials=config.tuning.trials,
        seeds=config.seeds,
        groups=summarise(entries, against, failures),
        notes=notes,
        hours=seconds / 3600,
    )


def _failure(final: FinalRun) -> str:
    why = ": ".join(each for each in (final.outcome.failure, final.outcome.message) if each)
    return f"seed {final.run.seed}: {why}"


def _shown(key: CellKey) -> str:
    _, model, method, budget = key
    return f"{model}, {method}" + ("" if budget is None else f" at {budget}")
