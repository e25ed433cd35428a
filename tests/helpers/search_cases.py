"""Spaces, and a toy recipe, that the tests of the search share."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embcomp.config.train_config import load_config
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.planning.config_plan import TableSize
from embcomp.search.api import Prepared, prepare_search
from embcomp.search.config.search_config import SearchConfig, parse_search
from embcomp.search.evaluators import training_evaluator
from embcomp.training.api import train

RECIPE = """# A toy recipe.
name: toy_recipe
data: {path: %s, batch_size: 64, eval_batch_size: 512}
tables: {embedding_dim: 8, method: full}
model: {name: deepfm, hidden_units: [8], batch_norm: false}
train: {epochs: 1, device: cpu}
"""
WIDTHS = [{"method": "low_dim", "width": [1, 2, 4, 8]}]


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """A toy dataset and a recipe for it; returns the recipe."""
    write_toy_dataset(
        folder / "toy", rows=(1024, 256, 256), num_values=(300, 60, 8), multi_valued=["C2"]
    )
    path = folder / "recipe.yaml"
    path.write_text(text % (folder / "toy"))
    return path


def search_document(recipe: Path | str, **changes: Any) -> dict[str, Any]:
    """A small search over widths."""
    return {
        "name": "toy_search",
        "recipe": str(recipe),
        "budget": "30%",
        "groups": [{"choices": WIDTHS}],
        "trials": {"count": 3, "devices": "cpu"},
        "fidelity": {"max_steps": 6, "valid_rows": 100},
        "finals": {"points": 1, "seeds": 1},
        **changes,
    }


def prepare(
    recipe: Path, rows: Sequence[int] | Mapping[str, int], *overrides: str, **changes: Any
) -> Prepared:
    """A search over tables of these rows, of which there are no data."""
    config: SearchConfig = parse_search(search_document(recipe, **changes), overrides)
    named = rows if isinstance(rows, Mapping) else {f"C{i + 1}": n for i, n in enumerate(rows)}
    return prepare_search(config, [TableSize(name=k, num_embeddings=n) for k, n in named.items()])


class _Ended:
    """A process that ended well."""

    pid = -1

    def poll(self) -> int:
        return 0


def train_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings of a search run in this process from now on, one after another.

    Each process that a search starts takes seconds to import TorchRec. Returns the names of the
    runs in the order in which they are started, finished ones that are only looked up included.
    """
    started: list[str] = []

    def popen(command: list[str], **_: object) -> _Ended:
        config, runs = load_config(command[-3]), command[-1]
        assert command[-2] == "--runs", "timed look-ups need a process of their own"
        started.append(config.name)
        train(config, runs=runs, quiet=True)
        return _Ended()

    replaced = SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(training_evaluator, "subprocess", replaced)
    return started
