"""What the command line and other programs call: prepare a search, run it, read its result."""

from __future__ import annotations

import random
from pathlib import Path

import optuna

from embcomp.search.config.search_config import SearchConfig
from embcomp.search.evaluators.training_evaluator import make_slots
from embcomp.search.prepared import (
    Prepared,
    directions_of,
    prepare_search,
)
from embcomp.search.reporting.results import SearchResult
from embcomp.search.samplers.baselines import starts
from embcomp.search.search_run import SearchRun, make_evaluator
from embcomp.search.space.space import Candidate
from embcomp.search.trials.storage import explained, open_storage
from embcomp.search.trials.trial_progress import SearchConsole

__all__ = [
    "SEARCHES",
    "Prepared",
    "directions_of",
    "example_candidates",
    "make_evaluator",
    "prepare_search",
    "search",
]

SEARCHES = "searches"


def search(
    config: SearchConfig, *, folder: str | Path = SEARCHES, quiet: bool = False
) -> SearchResult:
    """Search, join a search that goes on, or go on with one that was interrupted.

    Args:
        config: the search, from `embcomp.search.load_search`.
        folder: the folder of all searches; this one's is `<folder>/<config.name>`.
        quiet: whether to print nothing.

    Raises:
        EmbcompError: Bad input of any kind, before any candidate is trained.
        StorageError: The study's storage cannot be used; finished candidates are kept.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    prepared = prepare_search(config)
    home = Path(folder) / config.name
    home.mkdir(parents=True, exist_ok=True)
    slots = make_slots(config.trials, cuda_devices())
    evaluator = make_evaluator(prepared, home, slots)
    storage = open_storage(config.storage, home)
    with explained(config.storage, home), SearchConsole(config, enabled=not quiet) as console:
        run = SearchRun(prepared, home, storage, console, slots, evaluator)
        study = run.propose()
        selected = run.select(study)
        retrained = run.retrain(selected)
        result = run.report(study, selected, retrained)
    result.save(home)
    from embcomp.search.reporting.page import write_search_page

    write_search_page(result, home / "search.html")
    return result


def cuda_devices() -> int:
    """How many CUDA devices there are."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def example_candidates(prepared: Prepared, count: int) -> dict[str, Candidate]:
    """The equal share, another start, then random proposals after repair, by name."""
    found: dict[str, Candidate] = {}
    for name, candidate in list(starts(prepared.repair).items())[:2]:
        found[name] = candidate
    draw = random.Random(prepared.config.seed)
    for attempt in range(1, 20 * count):
        if len(found) >= count:
            break
        proposal = tuple(draw.randrange(len(unit.options)) for unit in prepared.space.units)
        candidate = prepared.repair(proposal, fill=prepared.config.fills)
        if candidate not in found.values():
            found[f"random {attempt}"] = candidate
    return found
