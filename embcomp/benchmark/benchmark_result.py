"""What a benchmark found, as `benchmark_result.json` holds it: a line for each method at each budget."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embcomp.benchmark.ledger import Entry
from embcomp.benchmark.significance import PairedDifference, auc_standard_error, swallowed
from embcomp.errors import EmbcompError, one_line
from embcomp.io.atomic_files import write_atomically
from embcomp.io.json_values import plain_json

RESULT_FILE = "benchmark_result.json"
FORMAT = 1

CellKey = tuple[str, str, str, str | None]
"""Dataset and task, model, method and budget."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over seeds.

    Attributes:
        mean: over the seeds.
        deviation: standard deviation; 0 of one seed.
    """

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of some values; None of none."""
        if not values:
            return None
        several = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(mean=statistics.fmean(values), deviation=several)


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """A method at a budget, on one dataset with one model.

    Attributes:
        method: what it is called.
        budget: as it was given; None where no budget sizes it.
        seeds: final runs that succeeded.
        failures: why others did not.
        auc: of the test split.
        log_loss: of the test split.
        tables: bytes of the embedding tables as they are served, codes and maps included.
        beside_rows: bytes of codes, maps and masks among them; None where training finds how many.
        first_order: bytes of first-order weights.
        dense: bytes of the network's other parameters.
        share_cut: `tables` over the full tables of the vocabulary as it was prepared.
        share_uncut: over tables with a row for each value of the train split.
        row_learning_rate: the rate that was chosen for rows.
        dense_learning_rate: and for the rest.
        settings: what was chosen for settings that were tuned.
        trials: how many trials chose.
        training_seconds: mean time of training steps and searches.
        memory: mean peak of a training's process beyond what it held before, in bytes.
        look_up_microseconds: mean time to look up a batch in the form that is served.
        against: compared with each reference at the same budget, where scores are at hand.
    """

    method: str
    budget: str | None
    seeds: int
    failures: list[str]
    auc: Spread | None
    log_loss: Spread | None
    tables: float
    beside_rows: int | None
    first_order: int
    dense: int
    share_cut: float
    share_uncut: float
    row_learning_rate: float
    dense_learning_rate: float
    settings: dict[str, Any]
    trials: int
    training_seconds: float
    memory: float | None
    look_up_microseconds: float | None
    against: dict[str, PairedDifference] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The line for people."""
        return self.method if self.budget is None else f"{self.method} at {self.budget}"


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """All methods on one dataset with one model.

    Attributes:
        dataset: its name.
        digest: what tells it from others.
        model: the model's name.
        recipe: what was trained.
        positives: rows of the test split that are positive.
        negatives: the others.
        full_cut: bytes of the full tables of the vocabulary as prepared.
        full_uncut: and of the uncut one.
        standard_error: of one AUC over rows, at the mean AUC.
        is_swallowed: whether that is as large as all differences between methods.
        cells: the lines.
    """

    dataset: str
    digest: str
    model: str
    recipe: str
    positives: int
    negatives: int
    full_cut: int
    full_uncut: int
    standard_error: float
    is_swallowed: bool
    cells: list[CellResult]

    @property
    def title(self) -> str:
        """The group for people."""
        return f"{self.model} on {self.dataset}"

    def warning(self) -> str:
        """What to say where differences drown in chance; empty where they do not."""
        if not self.is_swallowed:
            return ""
        return (
            f"{self.title}: one AUC has a standard error of {self.standard_error:.4f} over rows, with "
            f"{self.positives:,} positives in the test split, as much as all methods differ by. "
            "Read the paired comparisons rather than the order of means, or take more test rows."
        )


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Everything that a benchmark found.

    Attributes:
        name: the benchmark's.
        quality: the validation metric that tuned.
        trials: trials of each cell.
        seeds: final runs of each cell, at most.
        groups: a dataset and model each.
        notes: what was left out or cut short.
        hours: of trainings, added up.
        format: version of this file.
    """

    name: str
    quality: str
    trials: int
    seeds: int
    groups: list[GroupResult]
    notes: list[str]
    hours: float
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Write benchmark_result.json."""
        text = json.dumps(plain_json(dataclasses.asdict(self)), indent=1) + "\n"
        write_atomically(folder / RESULT_FILE, text)

    @classmethod
    def load(cls, folder: str | Path) -> BenchmarkResult:
        """The result of a finished benchmark."""
        path = Path(folder) / RESULT_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["groups"] = [_group_of(group) for group in content["groups"]]
            return cls(**content)
        except FileNotFoundError:
            raise EmbcompError(
                f"{folder} has no {RESULT_FILE}: the benchmark has not finished; start it again"
            ) from None
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise EmbcompError(
                f"{path} is not a result of this version: {one_line(error)}"
            ) from None


def _group_of(content: dict[str, Any]) -> GroupResult:
    cells = []
    for cell in content["cells"]:
        spreads = {key: cell[key] and Spread(**cell[key]) for key in ("auc", "log_loss")}
        against = {name: PairedDifference(**each) for name, each in cell["against"].items()}
        cells.append(CellResult(**{**cell, **spreads, "against": against}))
    error = content["standard_error"]
    known = math.nan if error is None else error
    return GroupResult(**{**content, "cells": cells, "standard_error": known})


def summarise(
    entries: Sequence[Entry],
    against: Mapping[CellKey, Mapping[str, PairedDifference]],
    failures: Mapping[CellKey, Sequence[str]],
) -> list[GroupResult]:
    """Put the entries of a ledger together: a group for each dataset and model.

    Args:
        entries: of the ledger, whoever wrote them.
        against: comparisons with references, where scores are at hand.
        failures: why runs of a cell failed.
    """
    groups: dict[tuple[str, str], dict[CellKey, list[Entry]]] = {}
    for entry in entries:
        key = key_of(entry)
        groups.setdefault(key[:2], {}).setdefault(key, []).append(entry)
    return [
        _summarised({key: _as_tuned_last(own) for key, own in cells.items()}, against, failures)
        for cells in groups.values()
    ]


def key_of(entry: Entry) -> CellKey:
    """The cell of an entry."""
    place = f"{entry['dataset']['digest']} {entry['task']}"
    return place, entry["model"], entry["method"], entry["budget"]


def _as_tuned_last(entries: Sequence[Entry]) -> list[Entry]:
    """The entries of a cell whose rates and settings came of the most trials, of equals the latest."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        tuned = {key: each for key, each in entry["tuned"].items() if key not in ("best", "trials")}
        groups.setdefault(json.dumps(tuned, sort_keys=True), []).append(entry)
    return max(reversed(groups.values()), key=lambda own: own[-1]["tuned"]["trials"])


def _summarised(
    cells: Mapping[CellKey, Sequence[Entry]],
    against: Mapping[CellKey, Mapping[str, PairedDifference]],
    failures: Mapping[CellKey, Sequence[str]],
) -> GroupResult:
    first = next(iter(cells.values()))[0]
    dataset, rows = first["dataset"], first["dataset"]["rows"]["test"]
    positives = dataset["test_positives"]
    found = [
        _cell_result(own, dict(against.get(key, {})), list(failures.get(key, ())))
        for key, own in cells.items()
    ]
    means = [cell.auc.mean for cell in found if cell.auc is not None]
    mean = statistics.fmean(means) if means else math.nan
    error = auc_standard_error(mean, positives, rows - positives)
    return GroupResult(
        dataset=dataset["name"],
        digest=dataset["digest"],
        model=first["model"],
        recipe=first.get("recipe", ""),
        positives=positives,
        negatives=rows - positives,
        full_cut=first["bytes"]["full_cut"],
        full_uncut=first["bytes"]["full_uncut"],
        standard_error=error,
        is_swallowed=swallowed(means, error),
        cells=sorted(found, key=_by_budget),
    )


def _by_budget(cell: CellResult) -> tuple[float, float]:
    auc = math.nan if cell.auc is None else cell.auc.mean
    return (-cell.share_cut if cell.budget is None else -_share(cell), -auc)


def _share(cell: CellResult) -> float:
    """A budget as a number that orders budgets: shares by themselves, bytes by what they hold."""
    text = str(cell.budget)
    return float(text.rstrip("% ")) / 100 if text.endswith("%") else cell.share_cut


def _cell_result(
    entries: Sequence[Entry], against: dict[str, PairedDifference], failures: list[str]
) -> CellResult:
    first = entries[0]
    sizes, tuned = first["bytes"], first["tuned"]
    tables = statistics.fmean(entry["bytes"]["tables"] for entry in entries)
    return CellResult(
        method=first["method"],
        budget=first["budget"],
        seeds=len(entries),
        failures=failures,
        auc=Spread.of(_numbers(entries, "metrics", "test", "auc")),
        log_loss=Spread.of(_numbers(entries, "metrics", "test", "log_loss")),
        tables=tables,
        beside_rows=sizes["beside_rows"],
        first_order=sizes["first_order"],
        dense=sizes["dense"],
        share_cut=tables / sizes["full_cut"],
        share_uncut=tables / sizes["full_uncut"],
        row_learning_rate=tuned["row_learning_rate"],
        dense_learning_rate=tuned["dense_learning_rate"],
        settings=tuned["settings"],
        trials=tuned["trials"],
        training_seconds=statistics.fmean(_numbers(entries, "seconds", "training")),
        memory=_mean([_beyond(entry) for entry in entries]),
        look_up_microseconds=_mean(_numbers(entries, "look_up_microseconds")),
        against=against,
    )


def _numbers(entries: Sequence[Entry], *path: str) -> list[float]:
    found = []
    for entry in entries:
        value: Any = entry
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            found.append(float(value))
    return found


def _beyond(entry: Entry) -> float | None:
    peak, idle = entry["memory"]["peak"], entry["memory"]["idle"]
    return None if peak is None or idle is None else float(max(0, peak - idle))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
