"""What the command line and other programs call: prepare a search, run it, read its result."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.pruners import NopPruner

from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.schema import FILE_NAME, DatasetInfo
from embcomp.errors import ConfigError
from embcomp.planning.config_plan import TableSize, sizes_of_dataset
from embcomp.search.config.search_config import QUALITIES, SearchConfig
from embcomp.search.config.search_sections import LEAST_RANKED
from embcomp.search.evaluators.base import Evaluator
from embcomp.search.evaluators.training_evaluator import Slot, TrainingEvaluator, make_slots
from embcomp.search.evaluators.trial_pruning import make_pruner
from embcomp.search.reporting.correlation import choose_spread, correlate
from embcomp.search.reporting.results import SearchResult, gather
from embcomp.search.samplers.baselines import starts
from embcomp.search.samplers.derived_cma import has_pickled_state
from embcomp.search.samplers.gradient import at_budget
from embcomp.search.samplers.optuna_sampler import RepairedSampler, make_encoding, make_source
from embcomp.search.space.costs import Costs
from embcomp.search.space.device_limits import PlacementChecker, limits_of
from embcomp.search.space.repair import Repair
from embcomp.search.space.space import Candidate, Space, build_space
from embcomp.search.space.staged_methods import check_latency, check_stages
from embcomp.search.space.widths import widths_of
from embcomp.search.trials.candidate_jobs import CandidateJobs
from embcomp.search.trials.retraining import (
    FinalJobs,
    FinalsSampler,
    SelectedCandidate,
    finals_name,
    select_candidates,
    write_recipes,
)
from embcomp.search.trials.storage import explained, open_storage, open_study
from embcomp.search.trials.trial_progress import SearchConsole
from embcomp.search.trials.trial_queue import TrialQueue
from embcomp.search.trials.worker import Worker
from embcomp.tables.budget import parse_budget

SEARCHES = "searches"

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A search before its first candidate.

    Attributes:
        config: The search.
        base: The training recipe.
        space: What may be chosen.
        repair: Brings any candidate into the limits.
    """

    config: SearchConfig
    base: TrainConfig
    space: Space
    repair: Repair

    @property
    def budget(self) -> int:
        """Serving bytes."""
        return self.repair.budget


def prepare_search(config: SearchConfig, sizes: Sequence[TableSize] | None = None) -> Prepared:
    """Builds the space and checks that something in it is within the limits.

    Args:
        config: The search.
        sizes: The features; None takes those of the dataset that the recipe names.

    Raises:
        ConfigError: There is nothing to choose, or a name does not exist.
        BudgetError: No candidate is within the budget; the text names the floor.
        PlacementError: No candidate fits the devices.
    """
    base = config.base()
    if sizes is None:
        sizes = sizes_of_dataset(base.data.path)
        if config.quality == "gauc" and DatasetInfo.load(base.data.path).group is None:
            raise ConfigError(
                f"objectives: gauc needs a dataset with a group feature; {base.data.path} has "
                "none, so take auc or log_loss"
            )
    if config.sampler.name == "gradient":
        config = at_budget(config, base, sizes)
    space = build_space(config, base, sizes)
    check_stages(config, space)
    check_latency(config, space)
    if config.evaluator.name == "supernet":
        widths_of(space)
    budget = parse_budget(config.budget, full_bytes=space.full_bytes)
    costs = Costs(space)
    devices = PlacementChecker(space, costs, limits_of(config, base, space.recipe_plan.dense_rows))
    repair = Repair(space, costs, devices, budget, config.importance)
    return Prepared(config=config, base=base, space=space, repair=repair)


def search(
    config: SearchConfig, *, folder: str | Path = SEARCHES, quiet: bool = False
) -> SearchResult:
    """Searches, joins a search that goes on, or goes on with one that was interrupted.

    Args:
        config: The search, from `embcomp.search.load_search`.
        folder: The folder of all searches; this one's is `<folder>/<config.name>`.
        quiet: Whether to print nothing.

    Raises:
        EmbcompError: Bad input of any kind, before any candidate is trained.
        StorageError: The study's storage cannot be used; finished candidates are kept.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    prepared = prepare_search(config)
    home = Path(folder) / config.name
    home.mkdir(parents=True, exist_ok=True)
    slots = make_slots(config, _cuda_devices())
    evaluator = make_evaluator(prepared, home, slots)
    encoding = make_encoding(config, prepared.repair)
    source = make_source(config, prepared.repair, encoding)
    sampler = RepairedSampler(
        source,
        encoding,
        prepared.repair,
        fill=config.fills,
        quality_sign=-1 if config.quality == "log_loss" else 1,
        seed=config.seed,
    )
    storage = open_storage(config.storage, home)
    count = config.trials.count if source.count is None else source.count
    with explained(config.storage, home), SearchConsole(config, enabled=not quiet) as console:
        study = open_study(
            storage,
            config.name,
            directions_of(config),
            sampler,
            make_pruner(config.fidelity.rungs, evaluator.steps, len(config.objectives)),
            identity_of(prepared, evaluator.steps),
        )
        for note in prepared.space.notes:
            console.log(note)
        if has_pickled_state(study):
            console.log(
                "an earlier version left pickled states of CMA-ES in this study; they are not read, "
                "and its state is worked out from the trials"
            )
        queue = TrialQueue(
            study, storage, encoding.distributions, count=count, retries=config.trials.retries
        )
        console.follow(study, f"{config.name}: {evaluator.fidelity}", count, evaluator.slots)
        try:
            evaluator.prepare()
            jobs = CandidateJobs(config, queue, sampler, prepared.repair, evaluator)
            Worker(queue, jobs, console, evaluator.slots).run()
        finally:
            evaluator.close()
        points = select_candidates(config, study, sampler)
        write_recipes(prepared.space, points, home / "points")
        retraining = Retraining(prepared, home, storage, console, slots)
        finals = retraining.run("finals", "chosen points in full", points)
        spread = choose_spread(config, study, sampler)
        if config.finals.correlation and not spread:
            console.log(f"fewer than {LEAST_RANKED} candidates were scored: too few to rank")
        ranked = retraining.run("correlation", "candidates in full, to rank them", spread)
        correlation = None
        if ranked is not None:
            twice = {(point.number, seed) for point in points for seed in point.seeds}
            correlation = correlate(
                ranked, spread, among_finals=twice, full_steps=evaluator.full_steps
            )
        result = gather(
            config,
            prepared.repair,
            sampler,
            study,
            points,
            finals,
            evaluator,
            correlation,
        )
    result.save(home)
    from embcomp.search.reporting.page import write_search_page

    write_search_page(result, home / "search.html")
    return result


def make_evaluator(prepared: Prepared, home: Path, slots: Sequence[Slot]) -> Evaluator:
    """What scores a search's candidates.

    Args:
        prepared: The search.
        home: Its folder.
        slots: What trainings may use.
    """
    config = prepared.config
    if config.evaluator.name == "training":
        return TrainingEvaluator(config, prepared.space, home, slots)
    from embcomp.search.evaluators.supernet_evaluator import SupernetEvaluator

    return SupernetEvaluator(config, prepared.space, home, slots, prepared.budget)


class Retraining:
    """Trains chosen candidates in full, each choice as a study of its own.

    Args:
        prepared: the search.
        home: its folder.
        storage: where its studies lie.
        console: sees it go on.
        slots: what trainings may use.
    """

    def __init__(
        self,
        prepared: Prepared,
        home: Path,
        storage: optuna.storages.BaseStorage,
        console: SearchConsole,
        slots: Sequence[Slot],
    ) -> None:
        self._config, self._space = prepared.config, prepared.space
        self._home, self._storage = home, storage
        self._console, self._slots = console, slots

    def run(
        self, what: str, title: str, points: Sequence[SelectedCandidate]
    ) -> optuna.Study | None:
        """Trains them, or what is left of them; None when there are none.

        Args:
            what: part of the study's name.
            title: for people.
            points: what to train.
        """
        if not points:
            return None
        config, sampler = self._config, FinalsSampler(points)
        name, direction = finals_name(config, points, what), directions_of(config)[:1]
        known = {"search": config.name}
        study = open_study(self._storage, name, direction, sampler, NopPruner(), known)
        count = len(sampler.pairs)
        queue = TrialQueue(
            study,
            self._storage,
            sampler.distributions,
            count=count,
            retries=config.trials.retries,
        )
        jobs = FinalJobs(config, self._space, points, self._home, self._slots)
        self._console.follow(study, f"{config.name}: {title}", count, len(self._slots))
        Worker(queue, jobs, self._console, len(self._slots)).run()
        return study


def directions_of(config: SearchConfig) -> list[Direction]:
    """Whether more or less is better, for each objective."""
    more = [name for name in QUALITIES if name != "log_loss"]
    return ["maximize" if name in more else "minimize" for name in config.objectives]


def identity_of(prepared: Prepared, steps: int) -> dict[str, Any]:
    """All that a candidate's score depends on; paths, counts and samplers may change."""
    config, space = prepared.config, prepared.space
    base = prepared.base.model_dump(mode="json")
    del base["name"]
    del base["data"]["path"]
    for key in ("method", "overrides", "budget", "row_types"):  # the options' labels say them
        del base["tables"][key]
    supernet = config.evaluator.model_dump(mode="json") if config.evaluator.method else None
    return {
        **({"evaluator": supernet} if supernet else {}),
        "space": {unit.name: [option.label for option in unit.options] for unit in space.units},
        "rows": {unit.name: unit.rows for unit in space.units},
        "budget": prepared.budget,
        "objectives": list(config.objectives),
        "fill": config.fills,
        "seed": config.seed,
        "fidelity": {"steps": steps, **config.fidelity.model_dump(mode="json")},
        "encoding": "relaxed" if config.sampler.name == "cmaes" else "settings",
        "dataset": _dataset_digest(prepared.base.data.path),
        "recipe": base,
    }


def _dataset_digest(path: str) -> str:
    import hashlib

    return hashlib.sha256((Path(path) / FILE_NAME).read_bytes()).hexdigest()[:16]


def _cuda_devices() -> int:
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
