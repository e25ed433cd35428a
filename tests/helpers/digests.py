"""Short names for what tensors, saved tables and prepared datasets hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType

DIM = 16
# Two features in one table, one feature in two tables, sums and means: (table, rows, features).
_TABLES = (("t0", 60, ("f0", "f1")), ("t1", 90, ("f2",)), ("t2", 75, ("f1",)))


def bag_tables() -> list[EmbeddingBagConfig]:
    """Three small tables for a pooled collection, of the sizes that conformance cases are for."""
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=DIM,
            feature_names=list(features),
            pooling=PoolingType.MEAN if name == "t1" else PoolingType.SUM,
        )
        for name, rows, features in _TABLES
    ]


def row_tables() -> list[EmbeddingConfig]:
    """The same for an unpooled collection."""
    return [
        EmbeddingConfig(
            name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=list(features)
        )
        for name, rows, features in _TABLES
    ]


def kind_of(tensor: Any) -> str:
    """Type and shape, as `float32 [60, 16]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def kinds_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Type and shape of each tensor, by name in sorted order."""
    return {name: kind_of(tensors[name]) for name in sorted(tensors)}


def sha(content: bytes) -> str:
    """The first 16 digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Type, shape and SHA-256 of the bytes of each tensor, by name in sorted order."""
    found = {}
    for name in sorted(tensors):
        raw = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found[name] = f"{kind_of(tensors[name])} {sha(raw.numpy().tobytes())}"
    return found


def artefact_digests(folder: Path) -> dict[str, Any]:
    """An artefact's tensors, and its description but for versions and checksums."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("embcomp_version", "sha256", "tensors", "files", "digest"):
        config.pop(name, None)
    config |= {f"tables.{key}": value for key, value in config.pop("tables").items()}
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    described = {key: json.dumps(value) for key, value in config.items()}
    return {"config": described, "tensors": tensor_digests(tensors)}


def dataset_digests(folder: Path, *, exact: bool) -> dict[str, Any]:
    """Columns, vocabularies and description of a prepared dataset, whatever wrote the Parquet.

    Args:
        folder: the dataset.
        exact: numbers to the bit; else those of the description, and the mean of each numeric
            column, to four places, as the last bit of a logarithm is the processor's.
    """
    text = (folder / "dataset.json").read_text(encoding="utf-8")
    info = json.loads(text, parse_float=float if exact else lambda digits: round(float(digits), 4))
    columns = {
        f"{split}.{name}": _column_digest(table[name], exact=exact)
        for split, part in info["splits"].items()
        for table in [pa.concat_tables([pq.read_table(folder / file) for file in part["files"]])]
        for name in table.column_names
    }
    words = {
        feature["name"]: _vocabulary_digest(pq.read_table(folder / feature["vocabulary"]))
        for feature in info["categorical"]
    }
    # This machine's libraries and paths, and digests of files that Parquet's writer has signed.
    for name in ("versions", "sources", "checksums", "digest"):
        info.pop(name, None)
    description = {key: sha(json.dumps(value).encode()) for key, value in info.items()}
    return {"columns": columns, "vocabularies": words, "description": description}


def _column_digest(column: pa.ChunkedArray, *, exact: bool) -> str:
    values = column.to_pylist()
    if pa.types.is_floating(column.type) and not exact:
        return f"{column.type} [{len(values)}] mean {sum(values) / len(values):.4f}"
    # Python writes the shortest digits that read back as the same number.
    return f"{column.type} [{len(values)}] {sha(json.dumps(values).encode())}"


def _vocabulary_digest(table: pa.Table) -> str:
    return f"{', '.join(table.column_names)} [{len(table)}] " + sha(
        json.dumps(table.to_pylist()).encode()
    )
