"""The YAML of a search, one to one as pydantic models; every key is checked before anything starts.

A search names a training recipe, a byte budget, the choices that tables have, and how candidates are
proposed and tried. What the recipe says of everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, field_validator, model_validator

from embcomp.config.catalog import recipe_document
from embcomp.config.sections import Bytes, FolderName, PositiveFloat, Seed, YamlConfig
from embcomp.config.train_config import Monitor, TrainConfig, parse_config
from embcomp.io.yaml_reading import (
    config_error,
    did_you_mean,
    listed,
    read_yaml,
)
from embcomp.search.config.choices import ChoiceConfig, GroupConfig
from embcomp.search.config.search_sections import (
    EvaluatorConfig,
    FidelityConfig,
    FinalsConfig,
    SamplerConfig,
    TopologyConfig,
    TrialsConfig,
)

QUALITIES: tuple[str, ...] = get_args(Monitor)
COSTS = ("bytes", "latency")
OBJECTIVES = (*QUALITIES, *COSTS)
ONE_OBJECTIVE = ("cmaes", "evolution", "greedy", "gradient")


class SearchConfig(YamlConfig):
    """Everything that a search depends on.

    Attributes:
        name: name of the study and of the search's folder.
        seed: of the sampler and of the candidates' training.
        recipe: a training recipe's name or file.
        overrides: keys of the recipe that are other here, nested as in its YAML.
        budget: serving bytes of all tables, as `64MiB` or `10%` of the full tables.
        train_per_device: bytes of tables and optimizer state on one device.
        objectives: `auc`, `gauc`, `log_loss` or a weighted one of them; then `bytes` or `latency`, if
            they are objectives.
        fill: whether candidates are brought up to the budget; by default unless bytes or latency
            is an objective.
        groups: choices of tables. Tables that no group names stay as the recipe has them.
        fixed: tables with one method, whatever the groups say.
        importance: how reluctantly a table gives way, by name; 1 for the others.
        sampler: where candidates come from.
        trials: how candidates are run.
        evaluator: what scores a candidate.
        fidelity: how much training a candidate gets, or the supernet.
        finals: what is retrained in full.
        topology: devices to place candidates on.
        storage: database URL of the study; None is a journal file in the search's folder.
    """

    name: FolderName
    seed: Seed = 2021
    recipe: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    budget: Bytes
    train_per_device: Bytes | None = None
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
        document, path = recipe_document(self.recipe, self.overrides)
        return parse_config(document, source=f"{path} with the search's overrides")


def load_search(path: str | Path, overrides: Iterable[str] = ()) -> SearchConfig:
    """Read and check the YAML of a search.

    Args:
        path: the YAML file.
        overrides: `key.path=value` strings; a value is parsed as YAML.

    Raises:
        ConfigError: On any problem, with every problem found and the keys that are valid.
    """
    return SearchConfig.load(path, overrides)


def parse_search(
    raw: Mapping[str, Any], overrides: Iterable[str] = (), source: str = "search"
) -> SearchConfig:
    """Check a search that is already a mapping; see `load_search`."""
    return SearchConfig.parse(raw, overrides, source=source)


def is_search(path: str | Path) -> bool:
    """Whether a YAML describes a search rather than a training run."""
    document = read_yaml(Path(path))
    return "recipe" in document and "model" not in document and "methods" not in document
