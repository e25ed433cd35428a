"""The parts of a search's YAML: where candidates come from, how they are tried, what is retrained.

`embcomp.search.config.search_config` puts them together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from embcomp.config.sections import (
    Bytes,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    readable_bytes,
)
from embcomp.io.numeric_settings import MOST
from embcomp.io.yaml_reading import bind_dataclass, config_error, listed

LEAST_RANKED = 8
"""Candidates whose ranks in a search and after retraining are worth comparing."""
SamplerName = Literal[
    "tpe", "nsga2", "cmaes", "random", "grid", "evolution", "greedy", "gradient", "uniform"
]


class SamplerConfig(Section):
    """Where candidates come from.

    Attributes:
        name: `tpe`, `nsga2`, `cmaes`, `random` and `grid` are Optuna's; `evolution` breeds the
            best so far; `greedy` measures each table alone and fills a knapsack; `gradient` trains
            `dnis` at the budget; `uniform` is the baseline of equal shares.
        starts: whether the equal share and power laws of the tables' rows are tried first.
        startup: candidates before TPE or CMA-ES model anything, starts included.
        population: candidates of an NSGA-II generation; with `evolution`, those that it begins
            with.
    """

    name: SamplerName = "tpe"
    starts: bool = True
    startup: PositiveInt = 10
    population: Annotated[int, Field(ge=2, le=MOST)] = 20


class RungsConfig(Section):
    """Candidates that do badly are stopped at rungs of `min_steps * reduction ** k` steps.

    Attributes:
        min_steps: steps to the first rung.
        reduction: one in so many candidates goes on from a rung.
        kind: `halving` or `hyperband`; several objectives always stop what is far from the front.
    """

    min_steps: PositiveInt
    reduction: Annotated[int, Field(ge=2, le=MOST)] = 3
    kind: Literal["halving", "hyperband"] = "halving"


class FidelityConfig(Section):
    """How much training a candidate gets; the chosen ones are retrained in full.

    Attributes:
        max_steps: steps, at most; None trains as long as the recipe.
        epochs: epochs, at most; None takes the recipe's.
        valid_rows: rows of the validation split that candidates are scored on; None takes all.
        rungs: where to stop the bad ones early; None trains all to the end.
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


class ProcessesConfig(Section):
    """How trainings are run, each in a process of its own.

    Attributes:
        parallel: how many at once, in each worker; None takes one on CPU, and on CUDA as many as
            the devices allow.
        world_size: ranks of one training.
        devices: `auto`, `cpu`, or CUDA device numbers.
        threads: CPU threads of a rank; None shares the cores out evenly.
        timeout: seconds after which a training that is tried is stopped and counts as failed.
        retries: how often one is begun again whose worker died.
    """

    parallel: PositiveInt | None = None
    world_size: PositiveInt = 1
    devices: Literal["auto", "cpu"] | tuple[NonNegativeInt, ...] = "auto"
    threads: PositiveInt | None = None
    timeout: PositiveFloat | None = None
    retries: NonNegativeInt = 5


class TrialsConfig(ProcessesConfig):
    """How candidates are run.

    Attributes:
        count: candidates to try.
    """

    count: PositiveInt = 40


class FinalsConfig(Section):
    """What is retrained in full, on all data, as an ordinary run.

    Attributes:
        points: how many candidates, the best or spread over the front.
        seeds: how many runs of each.
        baseline: whether the equal share is retrained beside them, when it was tried.
        correlation: how many candidates that a supernet scored are retrained once each, to see how
            well it ranks them; 0 for none, else at least 8.
    """

    points: NonNegativeInt = 3
    seeds: PositiveInt = 3
    baseline: bool = True
    correlation: NonNegativeInt = 0

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
        method: of the supernet: `matryoshka`, or the first stage of `optembed`.
        settings: of that method, as `weights`; its widths are those of the search's choices.
        rows: search-validation rows that a candidate is scored on, in whole batches; None takes
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
        world_size: ranks.
        device_memory: memory of one device.
        device: kind of device.
        reserve: memory of each device kept for everything but tables.
    """

    world_size: PositiveInt
    device_memory: Bytes
    device: Literal["cpu", "cuda"] = "cuda"
    reserve: int | str = "10%"

    @field_validator("reserve", mode="before")
    @classmethod
    def _may_be_nothing(cls, value: Any) -> Any:
        return "0" if str(value) in ("0", "0%") else readable_bytes(value)
