"""Names, shapes and types of state dicts are the checkpoint's format: they stay as they are.

`tests/stored/state_names.json` holds them; `tests/helpers/stored_values.py` says how it is written anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from embcomp import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from embcomp.config.train_config import parse_config
from embcomp.training import train
from tests.helpers.backends_under_test import CASES
from tests.helpers.digests import bag_tables, kinds_of, row_tables
from tests.helpers.long import long_but
from tests.helpers.staged_methods import STAGED
from tests.helpers.stored_values import check_keys, check_stored
from tests.helpers.training_cases import write_dataset

FILE = "state_names"


@pytest.mark.parametrize("case", CASES)
def test_tensors_of_a_collection_keep_their_names(case):
    config = CASES[case].config
    torch.manual_seed(0)
    pooled = CompressedEmbeddingBagCollection(bag_tables(), config).eval()
    unpooled = CompressedEmbeddingCollection(row_tables(), config).eval()
    state, rows = kinds_of(pooled.state_dict()), kinds_of(unpooled.state_dict())
    found = {
        "pooled": state,
        "unpooled": "as pooled" if rows == state else rows,
        "compact": kinds_of(pooled.compact().state_dict()),
        "serving": kinds_of(pooled.serving_tensors()),
    }
    check_stored(FILE, f"case {case}", found)


@pytest.mark.filterwarnings("ignore:Please use DTensor")
@pytest.mark.parametrize("method", long_but(["pq", "optembed"], STAGED))
def test_files_of_a_run_in_stages_keep_their_names(method, dataset, tmp_path):
    case = STAGED[method]
    document = {
        "name": method,
        "seed": 3,
        "data": {
            "path": str(dataset),
            "batch_size": 32,
            "eval_batch_size": 32,
            "search_share": 0.25,
        },
        "tables": {"embedding_dim": 8, "method": case.method, "budget": case.budget},
        "model": {"name": "deepfm", "hidden_units": [8], "batch_norm": False},
        "train": {"epochs": 1, "stages": case.stages},
    }
    train(parse_config(document), runs=tmp_path, quiet=True)
    check_stored(FILE, f"run {method}", files_of_run(tmp_path / method))


def test_no_other_names_are_stored():
    check_keys(FILE, [*(f"case {name}" for name in CASES), *(f"run {name}" for name in STAGED)])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def files_of_run(run: Path) -> dict[str, Any]:
    """What each file of a run has names for: tensors, fields of JSON, keys of the config."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.name == ".metadata":
            tensors = FileSystemReader(path.parent).read_metadata().state_dict_metadata
            found[name] = {key: kind_of_stored(tensors[key]) for key in sorted(tensors)}
        elif path.suffix == ".safetensors":
            found[name] = kinds_of(safetensors.torch.load_file(path))
        elif path.suffix == ".jsonl":
            lines = path.read_text().splitlines()
            found[name] = sorted({fields(json.loads(line)) for line in lines})
        elif path.suffix == ".json" and path.name != "dataset.json":
            found[name] = fields(json.loads(path.read_text()))
    return found


def kind_of_stored(metadata: Any) -> str:
    """As `kind_of`, of what a distributed checkpoint says of a tensor."""
    if not hasattr(metadata, "size"):
        return "bytes"
    return f"{str(metadata.properties.dtype).removeprefix('torch.')} {list(metadata.size)}"


def fields(value: Any) -> str:
    """The keys of JSON objects in one line, as `step, valid(auc, log_loss)`; of lists the first."""
    if isinstance(value, list):
        return f"[{fields(value[0])}]" if value and fields(value[0]) else ""
    if not isinstance(value, dict):
        return ""
    inner = {key: fields(each) for key, each in value.items()}
    return ", ".join(f"{key}({names})" if names else key for key, names in inner.items())
