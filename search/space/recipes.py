"""A candidate as a training config: an ordinary one, which `embcomp train` runs as it stands."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from embcomp.backends.base import BackendConfig
from embcomp.config.sections import MethodConfig
from embcomp.config.train_config import TrainConfig, parse_config
from embcomp.io.yaml_reading import plain
from embcomp.search.config.search_config import SearchConfig
from embcomp.search.config.search_sections import FidelityConfig
from embcomp.search.space.space import Candidate, Space


def config_of(
    space: Space, candidate: Candidate, name: str, seed: int | None = None
) -> TrainConfig:
    """The recipe with the candidate's tables.

    Args:
        space: the space.
        candidate: what to train.
        name: the run's name.
        seed: None takes the recipe's.
    """
    base = space.base
    sections = {
        "name": name,
        "seed": base.seed if seed is None else seed,
        "data": base.data,
        "tables": _tables_of(space, candidate),
        "model": base.model,
        "train": base.train,
    }
    return parse_config(sections, source=name)


def _tables_of(space: Space, candidate: Candidate) -> dict[str, Any]:
    """The recipe's section `tables` with the candidate's methods and row types."""
    tables = dict(space.base.tables)
    del tables["budget"]
    row_types = space.row_types(candidate)
    tables["row_types"] = {} if row_types.are_fp32 else row_types.plain()
    methods = space.methods(candidate)
    widths = _mixed_widths(space, methods)
    if widths is not None:
        return {**tables, "method": _choice(widths), "overrides": {}}
    # The commonest method is the default, so that the YAML stays short.
    texts = {table: yaml.safe_dump(written_method(each)) for table, each in methods.items()}
    common = Counter(texts.values()).most_common()
    default = min(text for text, count in common if count == common[0][1])
    own = {table: method for table, method in methods.items() if texts[table] != default}
    return {
        **tables,
        "method": _choice(next(each for table, each in methods.items() if table not in own)),
        "overrides": {table: _choice(method) for table, method in own.items()},
    }


def _choice(method: BackendConfig) -> MethodConfig:
    return MethodConfig(name=method.name, settings=method)


def _mixed_widths(space: Space, methods: Mapping[str, BackendConfig]) -> BackendConfig | None:
    """One method for tables that differ in width alone; full ones are those that it does not name.

    None where a table has another method, or all are alike.
    """
    widths = {}
    narrow: dict[str, BackendConfig] = {}
    for table in space.tables:
        method = methods[table.name]
        if not method.compresses:
            continue
        columns = method.columns(table)
        if columns is None or method.is_pruned(table):
            return None
        narrow[method.name] = method
        if columns < table.embedding_dim:
            widths[table.name] = columns
    if not widths or (len(widths) == len(methods) and len(set(widths.values())) == 1):
        return None
    if len(narrow) > 1:
        return None
    (method,) = narrow.values()
    return method.with_widths(widths)


def written_method(config: BackendConfig) -> dict[str, Any]:
    """A method as a YAML says it: its name, and what differs from the defaults."""
    written: dict[str, Any] = {"name": config.name}
    for field in dataclasses.fields(config):
        value = config.__dict__[field.name]
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.init and value != default:
            written[field.name] = plain(value)
    return written


def point_yaml(config: TrainConfig, comment: str) -> str:
    """A config as a recipe: a first comment line, and no defaults."""
    document = config.model_dump(mode="json", exclude_defaults=True)
    document["tables"]["method"] = written_method(config.tables.method.settings)
    overrides = {
        table: written_method(choice.settings) for table, choice in config.tables.overrides.items()
    }
    document["tables"].pop("overrides", None)
    if overrides:
        document["tables"]["overrides"] = overrides
    body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    return f"# {comment}\n{body}"


def trial_config(
    search: SearchConfig,
    space: Space,
    candidate: Candidate,
    name: str,
    view: str,
    seed: int | None = None,
) -> TrainConfig:
    """The recipe as a candidate is tried: on the dataset's view, for as long as the fidelity says.

    Rules that count evaluations are off, as there are more of them here.
    """
    config = config_of(space, candidate, name, search.seed if seed is None else seed)
    return for_search(search, config, view)


def full_config(
    search: SearchConfig, space: Space, candidate: Candidate, name: str, seed: int | None
) -> TrainConfig:
    """The recipe as a candidate is trained in full: on the whole dataset, with its own rules."""
    config = config_of(space, candidate, name, search.seed if seed is None else seed)
    if search.trials.devices != "cpu":
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})


def for_search(search: SearchConfig, config: TrainConfig, view: str) -> TrainConfig:
    """A run on the dataset's view, for as long as the search's fidelity says."""
    on_cpu = search.trials.devices == "cpu"
    return shortened(config, view, search.quality, search.fidelity, on_cpu=on_cpu)


def shortened(
    config: TrainConfig, view: str, quality: str, fidelity: FidelityConfig, *, on_cpu: bool
) -> TrainConfig:
    """A run on a dataset's view, for as long as a fidelity says.

    Args:
        config: the run in full.
        view: the folder of the view.
        quality: the metric that decides what is best.
        fidelity: how much training it gets.
        on_cpu: whether it stays away from CUDA devices.
    """
    train: dict[str, Any] = {
        "monitor": quality,
        "plateau": None,
        "early_stop": None,
        "keep_checkpoints": 1,
    }
    if fidelity.max_steps is not None:
        train["max_steps"] = min(fidelity.max_steps, config.train.max_steps or fidelity.max_steps)
    if fidelity.epochs is not None:
        train["epochs"] = min(fidelity.epochs, config.train.epochs)
    if fidelity.rungs is not None:
        train["eval_every"] = fidelity.rungs.min_steps
    if on_cpu:
        train["device"] = "cpu"
    # Values of settings that are checked already, and that no rule ties to the others.
    shorter = config.model_copy(update={"train": config.train.model_copy(update=train)})
    return shorter.with_data(view)
