"""The YAML of a search, one to one as pydantic models; every key is checked before anything starts.

A search names a training recipe, a byte budget, the choices that tables have, and how candidates are
proposed and tried. What the recipe says of everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from embcomp.budget import parse_budget
from embcomp.config import PositiveFloat, PositiveInt, Section, TrainConfig, parse_config
from embcomp.config_reading import (
    apply_override,
    bind_dataclass,
    config_error,
    describe_errors,
    did_you_mean,
    listed,
    plain,
    read_yaml,
)
from embcomp.errors import ConfigError
from embcomp.search.choices import ChoiceConfig, GroupConfig

QUALITIES = ("auc", "gauc", "log_loss")
COSTS = ("bytes", "latency")
OBJECTIVES = (*QUALITIES, *COSTS)
LEAST_RANKED = 8
"""Candidates whose ranks in a search and after retraining are worth comparing."""
ONE_OBJECTIVE = ("cmaes", "evolution", "greedy", "gradient")

SamplerName = Literal[
    "tpe", "nsga2", "cmaes", "random", "grid", "evolution", "greedy", "gradient", "uniform"
]


class SamplerConfig(Section):
    """Where candidates come from.

    Attributes:
        name: `tpe`, `nsga2`, `cmaes`, `random` and `grid` are Optuna's; `evolution` breeds the
            best so far; `greedy` measures each table alone and fills a knapsack; `gradient` trains
            `dnis` at the budget; `uniform` is the baseline of equal shares.
        starts: Whether the equal share and power laws of the tables' rows are tried first.
        startup: Candidates before TPE or CMA-ES model anything, starts included.
        population: Candidates of an NSGA-II generation; with `evolution`, those that it begins
            with.
    """

    name: SamplerName = "tpe"
    starts: bool = True
    startup: PositiveInt = 10
    population: Annotated[int, Field(ge=2)] = 20


class RungsConfig(Section):
    """Candidates that do badly are stopped at rungs of `min_steps * reduction ** k` steps.

    Attributes:
        min_steps: Steps to the first rung.
        reduction: One in so many candidates goes on from a rung.
        kind: `halving` or `hyperband`; several objectives always stop what is far from the front.
    """

    min_steps: PositiveInt
    reduction: Annotated[int, Field(ge=2)] = 3
    kind: Literal["halving", "hyperband"] = "halving"


class FidelityConfig(Section):
    """How much training a candidate gets; the chosen ones are retrained in full.

    Attributes:
        max_steps: Steps, at most; None trains as long as the recipe.
        epochs: Epochs, at most; None takes the recipe's.
        valid_rows: Rows of the validation split that candidates are scored on; None takes all.
        rungs: Where to stop the bad ones early; None trains all to the end.
    """

    max_steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    valid_rows: PositiveInt | None = None
    rungs: RungsConfig | None = None

    @model_validator(mode="after")
    def _rungs_lie_before_the_end(self) -> FidelityConfig:
        if self.rungs and self.max_steps and self.rungs.min_steps >= self.max_steps:
            raise config_error(
                f"rungs.min_steps {self.rungs.min_steps} must be below max_steps {self.max_steps}"
            )
        return self


class TrialsConfig(Section):
    """How candidates are run.

    Attributes:
        count: Candidates to try.
        parallel: How many at once, in each worker; None takes one on CPU, and on CUDA as many as
            the devices allow.
        world_size: Ranks of one candidate's training.
        devices: `auto`, `cpu`, or CUDA device numbers.
        threads: CPU threads of a rank; None shares the cores out evenly.
        timeout: Seconds after which a candidate is stopped and counts as failed.
        retries: How often a candidate is tried again whose worker died.
    """

    count: PositiveInt = 40
    parallel: PositiveInt | None = None
    world_size: PositiveInt = 1
    devices: Literal["auto", "cpu"] | tuple[Annotated[int, Field(ge=0)], ...] = "auto"
    threads: PositiveInt | None = None
    timeout: PositiveFloat | None = None
    retries: Annotated[int, Field(ge=0)] = 5


class FinalsConfig(Section):
    """What is retrained in full, on all data, as an ordinary run.

    Attributes:
        points: How many candidates, the best or spread over the front.
        seeds: How many runs of each.
        baseline: Whether the equal share is retrained beside them, when it was tried.
        correlation: How many candidates that a supernet scored are retrained once each, to see how
            well it ranks them; 0 for none, else at least 8.
    """

    points: Annotated[int, Field(ge=0)] = 3
    seeds: PositiveInt = 3
    baseline: bool = True
    correlation: Annotated[int, Field(ge=0)] = 0

    @field_validator("correlation")
    @classmethod
    def _enough_to_rank(cls, count: int) -> int:
        if 0 < count < LEAST_RANKED:
            raise config_error(
                f"the ranks of {count} candidates say little; take at least {LEAST_RANKED}, or 0 "
                "to leave them out"
            )
        return count


class EvaluatorConfig(Section):
    """What scores a candidate.

    A bare string is short for an evaluator without settings.

    Attributes:
        name: `training` trains each candidate; `supernet` trains nested widths once, and scores a
            candidate by one pass over search-validation rows.
        method: Of the supernet: `matryoshka`, or the first stage of `optembed`.
        settings: Of that method, as `weights`; its widths are those of the search's choices.
        rows: Search-validation rows that a candidate is scored on, in whole batches; None takes
            all, `data.search_share` of the train split.
    """

    name: Literal["training", "supernet"] = "training"
    method: Literal["matryoshka", "optembed"] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    rows: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _method_takes_its_settings(self) -> EvaluatorConfig:
        if self.name == "training":
            if self.method is not None or self.settings or self.rows is not None:
                raise config_error("method, settings and rows are of the evaluator supernet")
            return self
        if self.method is None:
            raise config_error("evaluator supernet needs a method: matryoshka or optembed")
        own = [key for key in ("target_bytes", "width_grid", "prune") if key in self.settings]
        if own:
            raise config_error(
                f"settings: {listed(own)} follow from the search, which keeps all rows, and from "
                "its budget and choices; leave them out"
            )
        from embcomp.backends import BACKENDS

        bind_dataclass(BACKENDS[self.method], self.settings)
        return self


class TopologyConfig(Section):
    """Devices on which TorchRec's planner must be able to place every candidate.

    Attributes:
        world_size: Ranks.
        device_memory: Memory of one device.
        device: Kind of device.
        reserve: Memory of each device kept for everything but tables.
    """

    world_size: PositiveInt
    device_memory: PositiveInt | str
    device: Literal["cpu", "cuda"] = "cuda"
    reserve: PositiveInt | str = "10%"

    @field_validator("device_memory", "reserve")
    @classmethod
    def _is_readable(cls, value: int | str) -> int | str:
        if value not in ("0", "0%"):
            parse_budget(value)
        return value


class SearchConfig(Section):
    """Everything that a search depends on.

    Attributes:
        name: Name of the study and of the search's folder.
        seed: Of the sampler and of the candidates' training.
        recipe: A training recipe's name or file.
        overrides: Keys of the recipe that are other here, nested as in its YAML.
        budget: Serving bytes of all tables, as `64MiB` or `10%` of the full tables.
        train_per_device: Bytes of tables and optimizer state on one device.
        objectives: `auc`, `gauc` or `log_loss`; then `bytes` or `latency`, if they are objectives.
        fill: Whether candidates are brought up to the budget; by default unless bytes or latency
            is an objective.
        groups: Choices of tables. Tables that no group names stay as the recipe has them.
        fixed: Tables with one method, whatever the groups say.
        importance: How reluctantly a table gives way, by name; 1 for the others.
        sampler: Where candidates come from.
        trials: How candidates are run.
        evaluator: What scores a candidate.
        fidelity: How much training a candidate gets, or the supernet.
        finals: What is retrained in full.
        topology: Devices to place candidates on.
        storage: Database URL of the study; None is a journal file in the search's folder.
    """

    name: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0)] = 2021
    recipe: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    budget: PositiveInt | str
    train_per_device: PositiveInt | str | None = None
    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("auc",)
    fill: bool | None = None
    groups: Annotated[tuple[GroupConfig, ...], Field(min_length=1)]
    fixed: dict[str, ChoiceConfig] = Field(default_factory=dict)
    importance: dict[str, PositiveFloat] = Field(default_factory=dict)
    sampler: SamplerConfig = SamplerConfig()
    trials: TrialsConfig = TrialsConfig()
    evaluator: EvaluatorConfig = EvaluatorConfig()
    fidelity: FidelityConfig = FidelityConfig()
    finals: FinalsConfig = FinalsConfig()
    topology: TopologyConfig | None = None
    storage: str | None = None

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if name in (".", "..") or any(character in name for character in '/\\:*?"<>|\0'):
            raise config_error(f"the name becomes a folder; {name!r} cannot be one")
        return name

    @field_validator("budget", "train_per_device")
    @classmethod
    def _budget_is_readable(cls, budget: int | str | None) -> int | str | None:
        if budget is not None:
            parse_budget(budget)
        return budget

    @field_validator("objectives", mode="before")
    @classmethod
    def _one_may_stand_alone(cls, objectives: Any) -> Any:
        return [objectives] if isinstance(objectives, str) else objectives

    @field_validator("objectives")
    @classmethod
    def _objectives_exist(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        for name in objectives:
            if name not in OBJECTIVES:
                hint = did_you_mean(name, OBJECTIVES)
                raise config_error(
                    f"no metric is called {name!r}{hint}; they are {listed(OBJECTIVES)}"
                )
        if objectives[0] not in QUALITIES or any(name in QUALITIES for name in objectives[1:]):
            raise config_error(
                f"expected one of {listed(QUALITIES)} first, then any of {listed(COSTS)}; "
                f"got {listed(objectives)}"
            )
        if len(set(objectives)) < len(objectives):
            raise config_error(f"an objective appears twice in {listed(objectives)}")
        return objectives

    @model_validator(mode="after")
    def _parts_agree(self) -> SearchConfig:
        if self.sampler.name in ONE_OBJECTIVE and len(self.objectives) > 1:
            raise config_error(
                f"sampler {self.sampler.name!r} takes one objective, got {listed(self.objectives)}; "
                "use nsga2 or tpe"
            )
        if self.sampler.name == "greedy" and self.fidelity.rungs is not None:
            raise config_error("sampler 'greedy' compares all candidates, so it takes no rungs")
        if self.sampler.name == "gradient":
            self._check_gradient()
        if self.evaluator.name == "supernet":
            self._check_supernet()
        if self.finals.correlation:
            self._check_correlation()
        if any(choice.is_searched for choice in self.fixed.values()):
            raise config_error("fixed: a fixed table takes one value for each setting, not a list")
        return self

    def _check_correlation(self) -> None:
        if self.evaluator.name != "supernet":
            raise config_error(
                "finals.correlation asks how well a supernet ranks candidates; take evaluator "
                "supernet, or leave it out"
            )
        if self.finals.correlation > self.trials.count:
            raise config_error(
                f"finals.correlation {self.finals.correlation} is above trials.count "
                f"{self.trials.count}, and only candidates that were scored can be ranked"
            )

    def _check_gradient(self) -> None:
        choices = [choice for group in self.groups for choice in group.choices]
        if self.groups[0].tables != "all" or [choice.method for choice in choices] != ["dnis"]:
            raise config_error(
                "sampler 'gradient' learns the columns of all tables together; give it one group, "
                "{tables: all, choices: [{method: dnis}]}"
            )
        if choices[0].is_searched:
            raise config_error("sampler 'gradient' takes one value for each setting, not a list")
        if "serve_bytes" in choices[0].settings:
            raise config_error("sampler 'gradient': serve_bytes comes from the budget")
        if self.fidelity.rungs is not None:
            raise config_error("sampler 'gradient' has one candidate, so it takes no rungs")
        if self.evaluator.name == "supernet":
            raise config_error(
                "sampler 'gradient' trains columns by itself; take evaluator training with it"
            )

    def _check_supernet(self) -> None:
        if "latency" in self.objectives:
            raise config_error(
                "evaluator 'supernet' looks up full rows whatever the candidate, so it knows no "
                "latency; take bytes, or evaluator training"
            )
        if self.fidelity.rungs is not None:
            raise config_error("evaluator 'supernet' trains no candidate, so it takes no rungs")
        devices = self.trials.devices
        if isinstance(devices, tuple) and devices[:1] != (0,):
            raise config_error(
                "evaluator 'supernet' scores on device 0; put another there by "
                "CUDA_VISIBLE_DEVICES, and leave trials.devices at auto"
            )

    @property
    def quality(self) -> str:
        """The metric that says how good a candidate is."""
        return self.objectives[0]

    @property
    def fills(self) -> bool:
        """Whether candidates are brought up to the budget."""
        return len(self.objectives) == 1 if self.fill is None else self.fill

    def base(self) -> TrainConfig:
        """The training recipe, the search's overrides applied.

        Raises:
            ConfigError: when there is no such recipe, or it is not sound.
        """
        from embcomp.catalog import find_recipe

        path = find_recipe(self.recipe)
        document = read_yaml(path)
        _merge(document, plain(self.overrides))
        return parse_config(document, source=f"{path} with the search's overrides")

    def to_yaml(self) -> str:
        """The resolved config, defaults included; `load_search` reads it back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_search(path: str | Path, overrides: Iterable[str] = ()) -> SearchConfig:
    """Reads and checks the YAML of a search.

    Args:
        path: The YAML file.
        overrides: `key.path=value` strings; a value is parsed as YAML.

    Raises:
        ConfigError: On any problem, with every problem found and the keys that are valid.
    """
    path = Path(path)
    return parse_search(read_yaml(path), overrides, source=str(path))


def parse_search(
    raw: Mapping[str, Any], overrides: Iterable[str] = (), source: str = "search"
) -> SearchConfig:
    """Checks a search that is already a mapping; see `load_search`."""
    document = plain(raw)
    for override in overrides:
        apply_override(document, override)
    try:
        return SearchConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe_errors(error, SearchConfig)}") from None


def is_search(path: str | Path) -> bool:
    """Whether a YAML describes a search rather than a training run."""
    document = read_yaml(Path(path))
    return "recipe" in document and "model" not in document


def _merge(document: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Puts nested overrides over a document; a mapping that names a choice replaces it whole."""
    for key, value in overrides.items():
        old = document.get(key)
        if isinstance(old, str) and isinstance(value, dict) and "name" not in value:
            old = {"name": old}  # the short form of a choice
        if isinstance(old, dict) and isinstance(value, dict) and "name" not in value:
            document[key] = dict(old)
            _merge(document[key], value)
        else:
            document[key] = value
