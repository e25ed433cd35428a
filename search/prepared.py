"""A search before its first candidate: its space, its limits, and what its scores depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from embcomp.config.train_config import TrainConfig, is_loss
from embcomp.data_pipelines.schema import FILE_NAME, DatasetInfo
from embcomp.errors import ConfigError
from embcomp.planning.config_plan import TableSize, sizes_of_dataset
from embcomp.search.config.search_config import QUALITIES, SearchConfig
from embcomp.search.samplers.gradient import at_budget
from embcomp.search.space.costs import Costs
from embcomp.search.space.device_limits import PlacementChecker, limits_of
from embcomp.search.space.repair import Repair
from embcomp.search.space.space import Space, build_space
from embcomp.search.space.staged_methods import check_latency, check_stages
from embcomp.search.space.widths import widths_of
from embcomp.tables.budget import parse_budget

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A search before its first candidate.

    Attributes:
        config: the search.
        base: the training recipe.
        space: what may be chosen.
        repair: brings any candidate into the limits.
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
    """Build the space and check that something in it is within the limits.

    Args:
        config: the search.
        sizes: the features; None takes those of the dataset that the recipe names.

    Raises:
        ConfigError: There is nothing to choose, or a name does not exist.
        BudgetError: No candidate is within the budget; the text names the floor.
        PlacementError: No candidate fits the devices.
    """
    base = config.base()
    if sizes is None:
        sizes = sizes_of_dataset(base.data.path)
        _check_quality(config.quality, base.data.path)
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


def _check_quality(quality: str, path: str) -> None:
    """Raise where a dataset has no groups or weights that the metric needs."""
    info = DatasetInfo.load(path)
    if quality.endswith("gauc") and info.group is None:
        raise ConfigError(
            f"objectives: {quality} needs a dataset with a group feature; {path} has "
            "none, so take auc or log_loss"
        )
    if quality.startswith("weighted_") and info.weight is None:
        raise ConfigError(
            f"objectives: {quality} needs a dataset whose rows have weights; those of {path} have "
            f"none, so take {quality.removeprefix('weighted_')}"
        )


def directions_of(config: SearchConfig) -> list[Direction]:
    """Whether more or less is better, for each objective."""
    more = [name for name in QUALITIES if not is_loss(name)]
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
        "dataset": dataset_digest(prepared.base.data.path),
        "recipe": base,
    }


def dataset_digest(path: str) -> str:
    """What tells a prepared dataset from others: 16 digits of the digest of its description."""
    return hashlib.sha256((Path(path) / FILE_NAME).read_bytes()).hexdigest()[:16]
