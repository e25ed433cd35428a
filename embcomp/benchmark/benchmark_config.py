"""The YAML of a benchmark, one to one as pydantic models; every key is checked before anything starts.

A benchmark names a training recipe, the methods and byte budgets to compare on it, how many trials each
gets to find its learning rates, and how many seeds the best rates are trained with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from embcomp.config.catalog import recipe_document
from embcomp.config.sections import (
    Bytes,
    FolderName,
    ModelChoice,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    YamlConfig,
)
from embcomp.config.train_config import TrainConfig, parse_config
from embcomp.io.yaml_reading import config_error, listed, read_yaml
from embcomp.search.config.choices import ChoiceConfig
from embcomp.search.config.search_sections import FidelityConfig, ProcessesConfig

FULL = "full"
"""The method without compression, which is in every benchmark."""
REFERENCES = (FULL, "hash")
"""Methods that the others are said to be better than."""

Rates = tuple[PositiveFloat, PositiveFloat]


class ContestantConfig(Section):
    """A method to compare: settings with one value are fixed, a list of values is tuned.

    A bare string is short for a method as it comes.

    Attributes:
        choice: the method and the values of its settings.
        label: what results call it; by default its name, and its fixed settings where the method is
            there twice.
        overrides: keys of the recipe that are other for this method, nested as in its YAML.
    """

    choice: ChoiceConfig
    label: Annotated[str, Field(min_length=1, max_length=60)] | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _settings_beside_the_method(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"choice": value}
        if not isinstance(value, Mapping) or set(value) == {"choice", "label", "overrides"}:
            return value
        own = {key: value[key] for key in ("label", "overrides") if key in value}
        return {"choice": {key: each for key, each in value.items() if key not in own}, **own}

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        own: dict[str, Any] = {} if self.label is None else {"label": self.label}
        if self.overrides:
            own["overrides"] = self.overrides
        return {**self.choice.model_dump(mode="json"), **own}

    @field_validator("choice")
    @classmethod
    def _rows_are_fp32(cls, choice: ChoiceConfig) -> ChoiceConfig:
        if choice.row_types != ("fp32",):
            raise config_error(
                "row_type: a benchmark's bytes are those of float32 rows, so that methods compare; "
                "leave it out, and store narrower ones with `embcomp export --dtype`"
            )
        return choice

    @property
    def fixed(self) -> dict[str, Any]:
        """Settings with one value."""
        found = self.choice.settings.items()
        return {key: values[0] for key, values in found if len(values) == 1}

    @property
    def tuned(self) -> dict[str, tuple[Any, ...]]:
        """Settings with several values."""
        found = self.choice.settings.items()
        return {key: values for key, values in found if len(values) > 1}

    @property
    def name(self) -> str:
        """What results call it, where no other contestant has its method."""
        return self.label or self.choice.method


class TuningConfig(Section):
    """How learning rates and sensitive settings are found: with as many trials for everyone.

    Attributes:
        trials: trainings of each method at each budget, scored on the validation split. The first takes
            the recipe's own rates, the next few are spread evenly and are the same for all, the
            others are proposed by Optuna's TPE.
        rounds: in how many rounds; TPE proposes a round from those before it, so that what it
            proposes does not depend on how many workers there are.
        row_learning_rate: bounds for the rows' rate, tried on a logarithmic scale.
        dense_learning_rate: bounds for the rate of everything else.
    """

    trials: PositiveInt = 8
    rounds: PositiveInt = 2
    row_learning_rate: Rates = (0.005, 0.2)
    dense_learning_rate: Rates = (0.0003, 0.003)

    @field_validator("row_learning_rate", "dense_learning_rate")
    @classmethod
    def _low_comes_first(cls, bounds: Rates) -> Rates:
        if bounds[0] >= bounds[1]:
            raise config_error(f"expected [low, high], low below high; got {list(bounds)}")
        return bounds

    @model_validator(mode="after")
    def _rounds_have_trials(self) -> TuningConfig:
        if self.rounds > self.trials:
            raise config_error(f"rounds {self.rounds} is above trials {self.trials}")
        return self


class BenchmarkConfig(YamlConfig):
    """Everything that a benchmark depends on.

    Attributes:
        name: name of its studies and of its folder.
        seed: of the proposals and of the trainings that tune; final runs take the numbers after it.
        recipe: a training recipe's name or file.
        overrides: keys of the recipe that are other here, nested as in its YAML.
        methods: what is compared. `full` is there in any case.
        budgets: serving bytes of all tables, as `10%` or `64MiB`.
        budget_of: what a share is one of: the full tables of the `cut` vocabulary, as it was prepared, or
            of the `uncut` one, with a row for each value that the train split has.
        models: models to compare on; by default the recipe's own.
        seeds: final runs of each method at each budget, with the same seeds for all.
        quality: the validation metric that tunes.
        tuning: how rates and settings are found.
        fidelity: how much training a trial that tunes gets; by default as much as a final run.
        resamples: of the rows of the test split, for confidence.
        processes: how trainings are run.
        storage: database URL of the studies; None is a journal file in the benchmark's folder.
    """

    name: FolderName
    seed: Seed = 2021
    recipe: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    methods: Annotated[tuple[ContestantConfig, ...], Field(min_length=1)]
    budgets: Annotated[tuple[Bytes, ...], Field(min_length=1)] = ("50%", "20%", "10%", "5%", "1%")
    budget_of: Literal["cut", "uncut"] = "cut"
    models: tuple[ModelChoice, ...] = ()
    seeds: Annotated[int, Field(gt=0, le=1000)] = 5
    quality: Literal["auc", "log_loss"] = "auc"
    tuning: TuningConfig = TuningConfig()
    fidelity: FidelityConfig = FidelityConfig()
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 1000
    processes: ProcessesConfig = ProcessesConfig()
    storage: str | None = None

    @field_validator("fidelity")
    @classmethod
    def _all_trials_are_alike(cls, fidelity: FidelityConfig) -> FidelityConfig:
        if fidelity.rungs is not None:
            raise config_error(
                "rungs stop some trials before others, and here all get the same; leave them out"
            )
        return fidelity

    @field_validator("methods")
    @classmethod
    def _full_is_there(cls, methods: tuple[ContestantConfig, ...]) -> tuple[ContestantConfig, ...]:
        names = [each.name for each in methods]
        if not any(each.choice.method == FULL for each in methods):
            methods = (ContestantConfig.model_validate(FULL), *methods)
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        if twice:
            raise config_error(
                f"{twice[0]!r} is there twice; give one of them a label, as {{method: "
                f"{twice[0]}, label: another name}}"
            )
        return methods

    @field_validator("budgets", "models")
    @classmethod
    def _nothing_twice(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        shown = [getattr(each, "name", str(each)) for each in values]
        twice = [each for i, each in enumerate(shown) if each in shown[:i]]
        if twice:
            raise config_error(f"{twice[0]!r} is there twice in {listed(shown)}")
        return values

    def base(self) -> TrainConfig:
        """The training recipe, the benchmark's overrides applied.

        Raises:
            ConfigError: when there is no such recipe, or it is not sound.
        """
        document, path = recipe_document(self.recipe, self.overrides)
        return parse_config(document, source=f"{path} with the benchmark's overrides")

    @property
    def final_seeds(self) -> tuple[int, ...]:
        """The seeds of final runs; none of them tuned anything."""
        return tuple(self.seed + 1 + place for place in range(self.seeds))


def load_benchmark(path: str | Path, overrides: Iterable[str] = ()) -> BenchmarkConfig:
    """Read and check the YAML of a benchmark.

    Args:
        path: the YAML file.
        overrides: `key.path=value` strings; a value is parsed as YAML.

    Raises:
        ConfigError: On any problem, with every problem found and the keys that are valid.
    """
    return BenchmarkConfig.load(path, overrides)


def parse_benchmark(
    raw: Mapping[str, Any], overrides: Iterable[str] = (), source: str = "benchmark"
) -> BenchmarkConfig:
    """Check a benchmark that is already a mapping; see `load_benchmark`."""
    return BenchmarkConfig.parse(raw, overrides, source=source)


def is_benchmark(path: str | Path) -> bool:
    """Whether a YAML describes a benchmark rather than a search or a training run."""
    document = read_yaml(Path(path))
    return "recipe" in document and "methods" in document
