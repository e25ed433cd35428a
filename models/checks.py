"""Checks of hyper-parameters: each names the value, what came and what would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from typing_extensions import override

from embcomp.errors import ConfigError
from embcomp.io.constraints import Between, Broken, Count, Le, Rule
from embcomp.io.numeric_settings import shown

MOST_LAYERS = 1000
"""No network is deeper, nor has more heads or experts."""
WIDEST = 2**20
"""No layer is wider."""


@dataclass(frozen=True)
class Probability(Rule):
    """A number in [0, 1)."""

    @override
    def expected(self, value: Any) -> str:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
        return "" if fits else "a number in [0, 1)"


@dataclass(frozen=True)
class LayerWidths(Rule):
    """Widths of layers, of which there may be none."""

    whole = True

    @override
    def expected(self, value: Any) -> str:
        if isinstance(value, str) or not isinstance(value, Sequence):
            return "a list of layer widths, such as [400, 400]"
        if len(value) > MOST_LAYERS:
            return f"at most {MOST_LAYERS} layers, got {len(value)}"
        for width in value:
            if Count(1).expected(width):
                return f"layer widths of at least 1, got {width!r}"
            if expected := Le(WIDEST).expected(width):
                return f"layer widths of {expected}, got {width!r}"
        return ""


@dataclass(frozen=True)
class NameList(Rule):
    """Names of features, of which there may be none."""

    whole = True

    @override
    def expected(self, value: Any) -> str:
        fits = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        return "" if fits else "a list of names of features, such as [user]"


Dropout = Annotated[float, Probability()]
"""A share of activations that are dropped; at 1 nothing would pass."""
HiddenUnits = Annotated[tuple[int, ...], LayerWidths()]
"""Widths of hidden layers; there may be none."""
FeatureNames = Annotated[tuple[str, ...], NameList()]
"""Names of features; there may be none."""
Width = Annotated[int, Count(1), Le(WIDEST)]
"""Of a layer, a row or an attention."""
Depth = Annotated[int, Count(1), Le(MOST_LAYERS)]
"""How many layers, heads or experts."""
RATIO = Between(0, 1000, "(]")
Ratio = Annotated[float, RATIO]
"""How many times wider or narrower a layer is than another."""


def not_expected(broken: Broken) -> str:
    """The text of an error: a setting with its value, and what would do."""
    value = list(broken.value) if isinstance(broken.value, tuple) else broken.value
    expected = broken.expected
    if broken.choices:
        expected = f"one of {', '.join(map(repr, broken.choices))}"
    return f"{broken.field}={shown(value)}: expected {expected}"


def check_setting(name: str, value: Any, *rules: Rule) -> None:
    """Raise unless `value` keeps the rules."""
    for rule in rules:
        if expected := rule.expected(value):
            raise ConfigError(not_expected(Broken(name, "", value, value, expected)))


def check_positive(name: str, value: int, at_most: int = WIDEST) -> None:
    """Raise unless `value` is an integer from 1 to `at_most`."""
    check_setting(name, value, Count(1), Le(at_most))


def check_not_negative(name: str, value: int) -> None:
    """Raise unless `value` is an integer of at least 0."""
    check_setting(name, value, Count(0))


def check_dropout(name: str, value: float) -> None:
    """Raise unless `value` is a probability below 1 (at 1 nothing would pass)."""
    check_setting(name, value, Probability())


def check_ratio(name: str, value: float) -> None:
    """Raise unless `value` is a number above 0 by which a width may be multiplied or divided."""
    check_setting(name, value, RATIO)


def check_units(name: str, value: Sequence[int]) -> None:
    """Raise unless `value` is a sequence of layer widths of at least 1; it may be empty."""
    check_setting(name, value, LayerWidths())


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(not_expected(Broken(name, "", value, value, "", tuple(choices))))


def check_heads(attention_dim: int, num_heads: int) -> None:
    """Raise unless the attention width splits evenly over the heads."""
    check_positive("attention_dim", attention_dim)
    check_positive("num_heads", num_heads, MOST_LAYERS)
    if attention_dim % num_heads != 0:
        nearest = max(num_heads, round(attention_dim / num_heads) * num_heads)
        raise ConfigError(
            f"attention_dim={attention_dim}: expected a multiple of num_heads={num_heads}, "
            f"such as {nearest}"
        )


def check_two_fields(model: str, feature_names: Sequence[str], num_dense: int) -> None:
    """Raise unless there are two fields for a model that multiplies pairs of them."""
    if len(feature_names) + num_dense < 2:
        raise ConfigError(
            f"{model}: expected at least two fields, whose products it learns from; got "
            f"{list(feature_names)} and no numeric feature"
        )


def check_feature_names(feature_names: Sequence[str]) -> None:
    """Raise unless `feature_names` holds at least one name and none twice."""
    if isinstance(feature_names, str) or not feature_names:
        raise ConfigError(
            f"feature_names={feature_names!r}: expected the names of at least one categorical "
            "feature"
        )
    twice = sorted({name for name in feature_names if list(feature_names).count(name) > 1})
    if twice:
        raise ConfigError(f"feature_names: expected each name once, got {twice} more than once")
