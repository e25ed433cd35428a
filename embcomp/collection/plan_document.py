"""A resolved plan as plain JSON values: which method, every size fixed, holds which tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticCustomError

from embcomp.backends import BACKENDS
from embcomp.backends.base import BackendConfig
from embcomp.collection.plan import ResolvedPlan
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import bind_dataclass, did_you_mean, listed, plain
from embcomp.tables.specs import TableSpec


def plan_to_document(plan: ResolvedPlan) -> list[dict[str, Any]]:
    """One entry for each method, with its settings and the tables that it holds."""
    return [
        {"tables": [table.name for table in tables], "method": method_to_document(config)}
        for config, tables in plan.groups
    ]


def method_to_document(config: BackendConfig) -> dict[str, Any]:
    """A method's name and settings."""
    return {"name": config.name, **plain(dataclasses.asdict(config))}


def method_from_document(document: Mapping[str, Any], *, source: str) -> BackendConfig:
    """The method that `method_to_document` wrote.

    Args:
        document: the name and the settings.
        source: where it stands, for errors.

    Raises:
        ConfigError: for an unknown method, or settings that it does not take.
    """
    settings = dict(document)
    name = settings.pop("name", None)
    if name not in BACKENDS:
        raise ConfigError(
            f"{source}: unknown method {name!r}{did_you_mean(str(name), BACKENDS)}; this version "
            f"has {listed(BACKENDS)}"
        )
    try:
        return bind_dataclass(BACKENDS[name], settings)
    except PydanticCustomError as error:
        raise ConfigError(f"{source}: method {name!r}: {error.message()}") from None


def plan_from_document(
    document: Sequence[Mapping[str, Any]], tables: Sequence[TableSpec], *, source: str
) -> ResolvedPlan:
    """The plan that `plan_to_document` wrote.

    Args:
        document: one entry for each method.
        tables: all logical tables, in their order.
        source: where it stands, for errors.

    Raises:
        ConfigError: when it does not hold each of the tables once.
    """
    methods: dict[str, BackendConfig] = {}
    for entry in document:
        config = method_from_document(entry["method"], source=source)
        methods |= dict.fromkeys(entry["tables"], config)
    wanted = [table.name for table in tables]
    if sorted(methods) != sorted(wanted):
        odd = sorted(set(methods) ^ set(wanted))
        raise ConfigError(f"{source}: its tables and the model's differ in {listed(odd)}")
    return ResolvedPlan(tuple(tables), methods)
