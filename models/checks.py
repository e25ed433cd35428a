"""Checks of hyper-parameters: each names the value, what came and what would do."""

from __future__ import annotations

from collections.abc import Sequence

from embcomp.errors import ConfigError

MOST_LAYERS = 1000
"""No network is deeper, nor has more heads or experts."""
WIDEST = 2**20
"""No layer is wider."""


def check_positive(name: str, value: int, at_most: int = WIDEST) -> None:
    """Raise unless `value` is an integer from 1 to `at_most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}: expected an integer of at least 1")
    if value > at_most:
        raise ConfigError(f"{name}={value!r}: expected at most {at_most:,}")


def check_not_negative(name: str, value: int) -> None:
    """Raise unless `value` is an integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name}={value!r}: expected an integer of at least 0")


def check_dropout(name: str, value: float) -> None:
    """Raise unless `value` is a probability below 1 (at 1 nothing would pass)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ConfigError(f"{name}={value!r}: expected a number in [0, 1)")


def check_units(name: str, value: Sequence[int]) -> None:
    """Raise unless `value` is a sequence of layer widths of at least 1; it may be empty."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{name}={value!r}: expected a list of layer widths, such as [400, 400]")
    if len(value) > MOST_LAYERS:
        raise ConfigError(f"{name}: expected at most {MOST_LAYERS} layers, got {len(value)}")
    for width in value:
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ConfigError(
                f"{name}={list(value)!r}: expected layer widths of at least 1, got {width!r}"
            )
        check_positive(name, width)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


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
