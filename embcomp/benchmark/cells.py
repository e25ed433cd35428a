"""What a benchmark compares: a cell is a model, a method and a budget, and the runs that it stands for."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embcomp.benchmark.benchmark_config import FULL, BenchmarkConfig, ContestantConfig
from embcomp.config.catalog import put_over, recipe_document
from embcomp.config.sections import ModelChoice
from embcomp.config.train_config import TrainConfig, parse_config
from embcomp.data_pipelines.schema import FIRST_ID, DatasetInfo
from embcomp.errors import BudgetError, ConfigError, one_line
from embcomp.planning.config_plan import TableSize, plan_config, sizes_of
from embcomp.tables.budget import parse_budget
from embcomp.training.data import check_monitor, check_splits

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method at a budget, around which a model is trained.

    Args:
        model: the model's name.
        method: what results call the method.
        backend: the method's own name.
        budget: as the YAML has it; None for tables that no budget sizes.
        budget_bytes: the same in bytes.
        document: the training YAML, but for name, seed, rates and tuned settings.
        combinations: values of the tuned settings that are within the budget; one empty mapping where
            nothing is tuned but rates.
    """

    model: str
    method: str
    backend: str
    budget: str | None
    budget_bytes: int | None
    document: Mapping[str, Any] = field(repr=False)
    combinations: Sequence[Mapping[str, Any]] = ({},)

    @property
    def label(self) -> str:
        """The cell for people."""
        at = "" if self.budget is None else f" at {self.budget}"
        return f"{self.model}, {self.method}{at}"

    @property
    def slug(self) -> str:
        """The cell in file names."""
        parts = (self.model, self.method, (self.budget or "").rstrip("%"))
        return re.sub(r"[^A-Za-z0-9.-]+", "_", "-".join(each for each in parts if each))[:80]

    def run(self, tuned: Mapping[str, float | int], *, seed: int, name: str) -> TrainConfig:
        """An ordinary training run of the cell.

        Args:
            tuned: `row` and `dense`, the learning rates, and `settings`, the place of a combination.
            seed: its seed.
            name: its name.
        """
        document = copy.deepcopy(dict(self.document))
        put_over(document, {"tables": {"method": _method_of(document, self._settings(tuned))}})
        rates = {
            "row_optimizer": {"learning_rate": tuned["row"]},
            "dense_optimizer": {"learning_rate": tuned["dense"]},
        }
        _put_rates(document, rates)
        return parse_config({**document, "name": name, "seed": seed}, source=self.label)

    def _settings(self, tuned: Mapping[str, float | int]) -> Mapping[str, Any]:
        return self.combinations[int(tuned["settings"])]


def _method_of(document: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**document["tables"]["method"], **settings}


def _put_rates(document: dict[str, Any], rates: Mapping[str, Mapping[str, float]]) -> None:
    """Put learning rates in; an optimizer's name and its other settings stay."""
    train = document["train"] = dict(document.get("train") or {})
    for key, own in rates.items():
        there = train.get(key) or {}
        train[key] = {**({"name": there} if isinstance(there, str) else there), **own}


@dataclass(frozen=True, kw_only=True)
class PreparedBenchmark:
    """A benchmark before its first training.

    Attributes:
        config: the benchmark.
        base: its recipe, overrides applied.
        info: the dataset.
        cells: what is compared.
        notes: what was left out, and why.
        full_bytes: bytes of the full tables of the vocabulary as it was prepared.
        uncut_bytes: of tables with a row for each value of the train split.
    """

    config: BenchmarkConfig
    base: TrainConfig
    info: DatasetInfo
    cells: Sequence[Cell]
    notes: Sequence[str]
    full_bytes: int
    uncut_bytes: int


def prepare_benchmark(config: BenchmarkConfig) -> PreparedBenchmark:
    """Lay out the cells, and check that each can be trained, before anything is.

    Raises:
        ConfigError: the recipe, a method or a model is not sound, or nothing but full tables is left.
        DataError: the dataset is not there.
    """
    document, base = recipe_document(config.recipe, config.overrides)[0], config.base()
    info = DatasetInfo.load(base.data.path)
    check_splits(info)
    check_monitor(base, info)
    _check_rows(info)
    sizes = sizes_of(info)
    width = base.tables.embedding_dim
    full, uncut = (_FP32 * width * rows for rows in vocabulary_rows(info))
    models = config.models or (base.model,)
    cells: list[Cell] = []
    notes: list[str] = []
    for model, contestant in itertools.product(models, config.methods):
        if not model.settings.uses_embeddings:
            raise ConfigError(f"models: {model.name} has no embedding tables to compare methods by")
        for budget in _budgets_of(config, contestant):
            whole = {"cut": full, "uncut": uncut}[config.budget_of]
            size = None if budget is None else parse_budget(budget, full_bytes=whole)
            text = None if budget is None else str(budget)
            if size is not None and size >= full:
                notes.append(f"{contestant.name} at {text}: the full tables fit in {size:,} bytes")
                continue
            made = _cell(document, model, contestant, text, size, sizes, notes)
            cells += [] if made is None else [made]
    if all(cell.backend == FULL for cell in cells):
        raise ConfigError("; ".join(["methods: nothing is left to compare", *notes]))
    return PreparedBenchmark(
        config=config,
        base=base,
        info=info,
        cells=cells,
        notes=list(dict.fromkeys(notes)),
        full_bytes=full,
        uncut_bytes=uncut,
    )


def _check_rows(info: DatasetInfo) -> None:
    for name in ("valid", "test"):
        split = info.splits.get(name)
        if split is None or not 0 < split.positives < split.rows:
            raise ConfigError(
                f"{info.folder} has no split {name!r} with rows of both labels, and a benchmark tunes "
                "on valid and compares on test"
            )


def vocabulary_rows(info: DatasetInfo) -> tuple[int, int]:
    """Rows of full tables: of the vocabulary as prepared, and before rare values were left out.

    What the importer did not count, as ids that are hashes, counts as it was prepared.
    """
    cut = uncut = 0
    for feature in info.categorical:
        cut += feature.num_embeddings
        uncut += max(feature.num_embeddings, feature.num_raw_values + FIRST_ID)
    return cut, uncut


def _budgets_of(
    config: BenchmarkConfig, contestant: ContestantConfig
) -> Sequence[str | int | None]:
    """The budgets of a method; one without any where nothing of it is to be sized."""
    from embcomp.backends import BACKENDS

    backend = BACKENDS[contestant.choice.method]
    own_size = [key for key in backend.size_fields if key in contestant.choice.settings]
    return (None,) if not backend.compresses or own_size else config.budgets


def _cell(
    document: Mapping[str, Any],
    model: ModelChoice,
    contestant: ContestantConfig,
    budget: str | None,
    size: int | None,
    sizes: Sequence[TableSize],
    notes: list[str],
) -> Cell | None:
    """A cell, or None with a note where no combination of its settings is within the budget."""
    own = copy.deepcopy(dict(document))
    tables = own["tables"] = dict(own["tables"])
    tables["method"] = {"name": contestant.choice.method, **contestant.fixed}
    tables["budget"] = size
    tables.pop("overrides", None)
    own["model"] = model.model_dump(mode="json")
    put_over(own, contestant.overrides)
    tuned = contestant.tuned
    fitting, reason = [], ""
    for values in itertools.product(*tuned.values()):
        settings = dict(zip(tuned, values))
        tried = copy.deepcopy(own)
        tried["tables"]["method"] = _method_of(tried, settings)
        run = parse_config(tried, source=contestant.name)
        missing = run.tables.method.settings.missing()
        if missing is not None:
            raise ConfigError(f"methods: {contestant.name}: {missing}")
        try:
            plan_config(run, sizes)
        except BudgetError as error:
            reason = one_line(error)
            continue
        fitting.append(settings)
    cell = Cell(
        model=model.name,
        method=contestant.name,
        backend=contestant.choice.method,
        budget=budget,
        budget_bytes=size,
        document=own,
        combinations=fitting,
    )
    if not fitting:
        notes.append(f"{cell.label}: {reason}")
        return None
    return cell


def view_folder(home: Path) -> Path:
    """Where the dataset lies as trials see it that tune, without its test split."""
    return home / "data"
