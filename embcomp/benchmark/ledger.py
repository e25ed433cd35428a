"""The ledger: a line of JSON for each final run, which others can append to and anyone can check again.

A line says all that its run depends on (config, dataset's digest, versions, hardware), what came out
(metrics, bytes, times), and the digest of what it says itself and of the scores of the test rows. So it
can be checked without trusting who wrote it: bytes are worked out again from the config, metrics from
the scores where these are at hand.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcomp.benchmark.cells import PreparedBenchmark
from embcomp.benchmark.planned_runs import PlannedRun, config_digest
from embcomp.config.train_config import parse_config
from embcomp.errors import EmbcompError, one_line
from embcomp.io.atomic_files import write_atomically
from embcomp.io.digests import sha256_of_file, sha256_of_json
from embcomp.io.folder_lock import folder_lock
from embcomp.io.json_values import plain_json
from embcomp.planning.config_plan import TableSize, plan_config, sizes_of
from embcomp.search.evaluators.base import TrialResult
from embcomp.search.evaluators.trial_process import SCORES_FILE
from embcomp.training.reporting.metrics import compute_metrics

FORMAT = 1
LEDGER_FILE = "ledger.jsonl"
Entry = dict[str, Any]
_NEEDED = (
    "format",
    "benchmark",
    "dataset",
    "task",
    "model",
    "method",
    "budget",
    "seed",
    "run",
    "config",
    "tuned",
    "metrics",
    "bytes",
    "digest",
)


def entry_of(
    prepared: PreparedBenchmark,
    run: PlannedRun,
    outcome: TrialResult,
    *,
    trials: int,
    tuned_quality: float | None,
    dataset: str,
) -> Entry:
    """The ledger's line of a final run.

    Args:
        prepared: the benchmark.
        run: the run.
        outcome: what became of it.
        trials: how many trials tuned its cell.
        tuned_quality: the best validation metric among them.
        dataset: the dataset's digest.
    """
    info, details, cell = prepared.info, outcome.details, run.cell
    figures = details["report"]
    codes = _bytes_beside_rows(run, prepared, figures["serve_bytes"])
    document = run.config.model_dump(mode="json")
    entry: Entry = {
        "format": FORMAT,
        "benchmark": prepared.config.name,
        "recipe": prepared.config.recipe,
        "dataset": {
            "name": info.name,
            "digest": dataset,
            "rows": {name: split.rows for name, split in info.splits.items()},
            "test_positives": info.split("test").positives,
            "tables": {each.name: _size_json(each) for each in _sizes(prepared)},
        },
        "task": task_of(prepared),
        "model": cell.model,
        "method": cell.method,
        "budget": cell.budget,
        "budget_bytes": cell.budget_bytes,
        "seed": run.seed,
        "run": run.digest,
        "config": document,
        "tuned": {
            "row_learning_rate": run.tuned["row"],
            "dense_learning_rate": run.tuned["dense"],
            "settings": dict(cell.combinations[int(run.tuned["settings"])]),
            "trials": trials,
            "quality": prepared.config.quality,
            "best": tuned_quality,
        },
        "metrics": {"valid": details["valid"], "test": details["test"]},
        "bytes": {
            "tables": figures["serve_bytes"],
            "beside_rows": codes,
            "first_order": figures["first_order_bytes"],
            "dense": 4 * figures["dense_parameters"],
            "training": figures["train_bytes"],
            "full_cut": prepared.full_bytes,
            "full_uncut": prepared.uncut_bytes,
        },
        "seconds": {"training": figures["train_seconds"], "all": figures["wall_seconds"]},
        "rows_per_second": figures["rows_per_second"],
        "memory": {"peak": details.get("peak_memory"), "idle": details.get("idle_memory")},
        "look_up_microseconds": details.get("look_up_microseconds"),
        "versions": details.get("versions", {}),
        "hardware": details.get("hardware", {}),
        "scores_sha256": details.get("scores_sha256"),
    }
    entry = plain_json(entry)
    return {**entry, "digest": sha256_of_json(entry)}


def _sizes(prepared: PreparedBenchmark) -> list[TableSize]:
    return sizes_of(prepared.info)


def task_of(prepared: PreparedBenchmark) -> str:
    """What all methods are trained for: the recipe, whatever its tables, model, rates, name and place."""
    document = prepared.base.model_dump(mode="json")
    for key in ("name", "seed", "model"):
        del document[key]
    del document["data"]["path"]
    for key in ("method", "budget", "overrides"):
        del document["tables"][key]
    for key in ("row_optimizer", "dense_optimizer"):
        del document["train"][key]["learning_rate"]
    return sha256_of_json(document)[:16]


def _size_json(size: TableSize) -> dict[str, Any]:
    return {
        "rows": size.num_embeddings,
        "length": size.mean_length,
        "bags": size.has_bags,
        "hashed": size.hashed,
    }


def _bytes_beside_rows(run: PlannedRun, prepared: PreparedBenchmark, serve: int) -> int | None:
    """Bytes of codes, maps and masks; None where training finds how many there are."""
    lines = plan_config(run.config, _sizes(prepared)).lines()
    if sum(line.serve for line in lines) != serve:
        return None
    return sum(line.indices for line in lines)


def read_ledger(path: str | Path) -> list[Entry]:
    """The entries of a ledger.

    Raises:
        EmbcompError: there is none, or a line is no entry; the text has its number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise EmbcompError(f"{path}: no such ledger") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EmbcompError(f"{path} cannot be read: {one_line(error)}") from None
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EmbcompError(f"{where}: not JSON: {one_line(error)}") from None
        if not isinstance(entry, dict):
            raise EmbcompError(f"{where}: expected a JSON object, got {type(entry).__name__}")
        if entry.get("format") != FORMAT:
            raise EmbcompError(
                f"{where}: expected format {FORMAT}, got {entry.get('format')!r}; this version of "
                "embcomp reads no other"
            )
        missing = [key for key in _NEEDED if key not in entry]
        if missing:
            raise EmbcompError(f"{where}: the entry has no {missing[0]!r}")
        entries.append(entry)
    return entries


def append_entries(path: Path, entries: Iterable[Entry]) -> list[Entry]:
    """Add what a ledger does not have, under a lock; returns all that it has then.

    A run that is there already, by its digest, stays as it was written first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(path.with_name(f"{path.name}.lock"), busy=None):
        there = read_ledger(path) if path.exists() else []
        known = {entry["run"] for entry in there}
        new = [entry for entry in entries if entry["run"] not in known]
        if new:
            text = "".join(f"{json.dumps(entry, sort_keys=True)}\n" for entry in [*there, *new])
            write_atomically(path, text)
    return [*there, *new]


@dataclass(frozen=True, kw_only=True)
class LedgerCheck:
    """What came of checking a ledger again.

    Attributes:
        entries: how many there are.
        rescored: of how many the metrics were worked out again from kept scores.
        problems: what does not hold, one line each.
    """

    entries: int
    rescored: int
    problems: Sequence[str]


def verify_ledger(path: str | Path, finals: str | Path | None = None) -> LedgerCheck:
    """Check each entry of a ledger again.

    An entry must have the digest of what it says, a config that this version reads and whose digest is
    the run's, and bytes that follow from the config. Where the scores of its test rows are at
    hand, they must be those that were written, and give the metrics that it states.

    Args:
        path: the ledger.
        finals: the folder of final runs; by default `finals` beside the ledger.

    Raises:
        EmbcompError: it cannot be read.
    """
    folder = Path(path).parent / "finals" if finals is None else Path(finals)
    entries, problems, rescored = read_ledger(path), [], 0
    seen: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        where = f"entry {number} ({entry['method']}, {entry['budget']}, seed {entry['seed']})"
        found = list(_wrong(entry))
        if str(entry["run"]) in seen:
            found.append("its run is in the ledger twice")
        seen.add(str(entry["run"]))
        scores = _scores_of(entry, folder)
        if scores is not None:
            rescored += 1
            found += _wrong_scores(entry, scores)
        problems += [f"{where}: {each}" for each in found]
    return LedgerCheck(entries=len(entries), rescored=rescored, problems=problems)


def _wrong(entry: Entry) -> Iterable[str]:
    """What an entry says that does not agree with itself."""
    said = {key: value for key, value in entry.items() if key != "digest"}
    if sha256_of_json(said) != entry["digest"]:
        yield "its digest is not that of what it says: it was changed after it was written"
        return
    try:
        config = parse_config(entry["config"], source="its config")
        if config_digest(config, entry["dataset"]["digest"], "final") != entry["run"]:
            yield "its config is not that of the run that it names"
        yield from _wrong_bytes(entry)
    except (EmbcompError, KeyError, TypeError, AttributeError, ValueError) as error:
        yield one_line(error)


def _wrong_bytes(entry: Entry) -> Iterable[str]:
    config = parse_config(entry["config"], source="its config")
    sizes = [
        TableSize(
            name=name,
            num_embeddings=each["rows"],
            mean_length=each["length"],
            multi_valued=each["bags"],
            hashed=each["hashed"],
        )
        for name, each in entry["dataset"]["tables"].items()
    ]
    lines = plan_config(config, sizes).lines()
    most, said = sum(line.serve for line in lines), entry["bytes"]["tables"]
    learnt = any(line.learnt for line in lines)
    if said > most or (said < most and not learnt):
        yield f"its tables take {most:,} bytes by its config, and it says {said:,}"
    budget = entry["budget_bytes"]
    if budget is not None and said > budget:
        yield f"its tables take {said:,} bytes, over its budget of {budget:,}"


def _scores_of(entry: Entry, folder: Path) -> Path | None:
    path = folder / str(entry["config"].get("name", "")) / SCORES_FILE
    return path if path.is_file() else None


def read_scores(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The logits and labels (R,) that a final run kept of the test split.

    Raises:
        EmbcompError: the file is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            return held["logits"], held["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise EmbcompError(f"{path} holds no scores: {one_line(error)}") from None


def _wrong_scores(entry: Entry, path: Path) -> Iterable[str]:
    if sha256_of_file(path) != entry.get("scores_sha256"):
        yield f"{path} is not what was written when the run ended"
        return
    try:
        logits, labels = read_scores(path)
    except EmbcompError as error:
        yield str(error)
        return
    found = compute_metrics(logits, labels)
    said: Mapping[str, float] = entry["metrics"]["test"]
    for name, value in (("auc", found.auc), ("log_loss", found.log_loss)):
        if not math.isclose(said.get(name, math.nan), value, rel_tol=1e-9, abs_tol=1e-12):
            yield f"the test {name} of its scores is {value:.6f}, and it says {said.get(name)}"
