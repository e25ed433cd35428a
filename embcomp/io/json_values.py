"""Values as JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def without_nan(value: Any) -> Any:
    """NaN and infinities as None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def plain_json(value: Any) -> Any:
    """The same as `without_nan`, lists and tuples taken apart too."""
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain_json(item) for key, item in value.items()}
    return without_nan(value)
