"""Candidates as the parameters of an Optuna study, and back.

Settings are parameters of their own (`C3.method`, `C3.hash.ratio`), numbers by their place in
the list so that samplers know which are neighbours. A setting of a method that was not chosen keeps
its value without meaning anything: the parameters are the same for every candidate, which evolution
and CMA-ES need. In the relaxed form a unit is one real number between its options, sorted by bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from embcomp.search.space.options import Unit, Variant
from embcomp.search.space.space import Candidate, Space

Parameters = dict[str, Any]


class Encoding:
    """Translates between candidates and parameters.

    Args:
        space: the space.
        relaxed: whether a unit is one real number.
    """

    def __init__(self, space: Space, *, relaxed: bool = False) -> None:
        self._units = space.units
        self._relaxed = relaxed
        self.distributions: dict[str, BaseDistribution] = {}
        for unit in self._units:
            if len(unit.options) > 1:
                self.distributions |= _relaxed(unit) if relaxed else _settings(unit)
        self._places = [_places(unit) for unit in self._units]

    def decode(self, parameters: Mapping[str, Any]) -> Candidate:
        """The candidate that parameters describe."""
        return tuple(self._option(unit, parameters) for unit in self._units)

    def encode(self, candidate: Candidate, proposed: Mapping[str, Any] | None = None) -> Parameters:
        """Parameters of a candidate.

        Args:
            candidate: what was made of the proposal.
            proposed: the proposal's parameters, which stay where they mean the same.
        """
        parameters = dict(proposed or {})
        for unit, place, places in zip(self._units, candidate, self._places):
            if len(unit.options) == 1:
                continue
            given = _has(unit, parameters, self._relaxed)
            if given and self._option(unit, parameters) == place:
                continue
            if self._relaxed:
                parameters[unit.name] = float(place)
                continue
            variant, values = places[place]
            if len(unit.variants) > 1:
                parameters[_method(unit)] = variant.label
            for name, (index, value) in _named(unit, variant, values).items():
                parameters[name] = value if isinstance(index, str) else index
        for name, distribution in self.distributions.items():
            parameters.setdefault(name, _default(distribution))
        return {name: parameters[name] for name in self.distributions}

    def _option(self, unit: Unit, parameters: Mapping[str, Any]) -> int:
        if len(unit.options) == 1:
            return 0
        if self._relaxed:
            return round(parameters[unit.name])
        variant = unit.variants[0]
        if len(unit.variants) > 1:
            label = parameters[_method(unit)]
            variant = next(each for each in unit.variants if each.label == label)
        place = []
        for key, values in variant.grid.items():
            if len(values) == 1:
                place.append(0)
                continue
            given = parameters[_setting(unit, variant, key)]
            place.append(
                values.index(_ordered(values)[given])
                if _numeric(values)
                else [str(value) for value in values].index(given)
            )
        return variant.option_at[tuple(place)]


def _relaxed(unit: Unit) -> dict[str, BaseDistribution]:
    return {unit.name: FloatDistribution(0.0, len(unit.options) - 1.0)}


def _settings(unit: Unit) -> dict[str, BaseDistribution]:
    found: dict[str, BaseDistribution] = {}
    if len(unit.variants) > 1:
        labels = [variant.label for variant in unit.variants]
        found[_method(unit)] = CategoricalDistribution(labels)
    for variant in unit.variants:
        for key, values in variant.grid.items():
            if len(values) > 1 and _numeric(values):
                found[_setting(unit, variant, key)] = IntDistribution(0, len(values) - 1)
            elif len(values) > 1:
                choices = [str(value) for value in values]
                found[_setting(unit, variant, key)] = CategoricalDistribution(choices)
    return found


def _places(unit: Unit) -> dict[int, tuple[Variant, tuple[int, ...]]]:
    """For each option, the first variant and place that lead to it."""
    found: dict[int, tuple[Variant, tuple[int, ...]]] = {}
    for variant in unit.variants:
        for place, option in variant.option_at.items():
            found.setdefault(option, (variant, place))
    return found


def _named(
    unit: Unit, variant: Variant, place: tuple[int, ...]
) -> dict[str, tuple[int | str, str]]:
    """Parameter name to its index (numbers) or text, for a place in a variant's grid."""
    found: dict[str, tuple[int | str, str]] = {}
    for (key, values), i in zip(variant.grid.items(), place):
        if len(values) > 1:
            text = str(values[i])
            index = _ordered(values).index(values[i]) if _numeric(values) else text
            found[_setting(unit, variant, key)] = (index, text)
    return found


def _has(unit: Unit, parameters: Mapping[str, Any], relaxed: bool) -> bool:
    names = [unit.name] if relaxed else list(_settings(unit))
    return all(name in parameters for name in names)


def _default(distribution: BaseDistribution) -> object:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return distribution.low


def _method(unit: Unit) -> str:
    return f"{unit.name}.method"


def _setting(unit: Unit, variant: Variant, key: str) -> str:
    middle = f".{variant.label}" if len(unit.variants) > 1 else ""
    return f"{unit.name}{middle}.{key}"


def _numeric(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _ordered(values: tuple[Any, ...]) -> list[Any]:
    return sorted(values)
