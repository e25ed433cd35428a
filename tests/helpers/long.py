"""Which of many cases `make test` tries, and which `make test-long` adds."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

KILLS = int(os.environ.get("EMBCOMP_TEST_KILLS", "10"))
"""How often a loop of kills kills; 20 take twice as long."""


def long_but(kept: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Values to parametrize a test with: those kept are in every run, the others marked `long`.

    Tuples are the values of several arguments.
    """
    kept, values = list(kept), list(values)
    missing = [value for value in kept if value not in values]
    assert not missing, f"{missing} are no cases"
    return [
        value
        if value in kept
        else pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long
        )
        for value in values
    ]
