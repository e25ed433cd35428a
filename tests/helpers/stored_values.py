"""Values that may not change by accident: what is found now against the JSON in `tests/stored/`.

    REWRITE_STORED=1 python -m pytest tests/project/test_state_names.py

writes down what is found instead of comparing it; the difference of the JSON shows what changed.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

STORED = Path(__file__).resolve().parents[1] / "stored"
REWRITE = "REWRITE_STORED"
_LINES_SHOWN = 60


def check_stored(file: str, key: str, found: Any, *, within: float = 0.0) -> None:
    """Fail with a diff unless a value is the stored one.

    Args:
        file: the JSON in `tests/stored/`, without its ending.
        key: the value's name in the file.
        found: JSON values.
        within: how far numbers may be off, for a flat mapping to numbers.
    """
    stored = _read(file)
    if _is_rewriting():
        _write(file, {**stored, key: found})
        return
    if within and stored.get(key) == pytest.approx(found, abs=within):
        return
    old, new = _lines(stored.get(key)), _lines(found)
    if old != new:
        diff = list(difflib.unified_diff(old, new, "stored", "found", n=1, lineterm=""))
        more = [f"... {len(diff) - _LINES_SHOWN} more lines"] if len(diff) > _LINES_SHOWN else []
        text = "\n".join([*diff[:_LINES_SHOWN], *more])
        pytest.fail(
            f"{key} is not what tests/stored/{file}.json says:\n{text}\n"
            f"If it may change, run this again with {REWRITE}=1 and look at the JSON's diff.",
            pytrace=False,
        )


def check_keys(file: str, keys: Collection[str]) -> None:
    """Fail unless a file has a value for each key and no other; a rewrite drops the others."""
    stored = _read(file)
    if _is_rewriting():
        _write(file, {key: value for key, value in stored.items() if key in keys})
        return
    assert sorted(stored) == sorted(keys)


def _is_rewriting() -> bool:
    return os.environ.get(REWRITE) == "1"


def _read(file: str) -> dict[str, Any]:
    path = STORED / f"{file}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(file: str, content: dict[str, Any]) -> None:
    text = json.dumps(dict(sorted(content.items())), indent=1) + "\n"
    (STORED / f"{file}.json").write_text(text, encoding="utf-8")


def _lines(value: Any) -> list[str]:
    return json.dumps(value, indent=1).splitlines()
