"""Reading artefacts: from a folder to a module that answers. Nothing of the training is imported."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic_core import PydanticCustomError

from embcomp.errors import ArtefactError, ConfigError
from embcomp.io.yaml_reading import bind_dataclass, did_you_mean, listed
from embcomp.layers.named_parts import persistent_tensors
from embcomp.models import MODELS, ModelInputs
from embcomp.serving.artefact_config import CONFIG_FILE, ArtefactConfig, ModelRecord, TablesRecord
from embcomp.serving.artefact_folder import find_tensors
from embcomp.serving.artefact_integrity import checked
from embcomp.serving.artefact_tensors import ArtefactTensor, TensorReader, lazily
from embcomp.serving.modules import (
    MakeRows,
    ServingEmbeddingBagCollection,
    ServingEmbeddingCollection,
    ServingModel,
    check_shapes,
    rows_class,
)

_LARGE = 4 << 20  # bytes of an artefact from which on it is kept on large pages

Serving = ServingEmbeddingBagCollection | ServingEmbeddingCollection | ServingModel


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    rows: Literal["auto", "fused", "fbgemm", "torch"] = "auto",
    verify: bool = True,
    mmap: bool = False,
) -> Serving:
    """Read an artefact as a module that answers; no training code is imported.

    Args:
        path: the artefact's folder.
        device: where to serve.
        rows: what reads the rows: one compiled call for all features (`fused`, CPU, built on first
            use where there is a C++ compiler), FBGEMM's inference kernel (CPU), plain torch
            operations, or the fastest that there is.
        verify: whether to check, while they are read, that every file and tensor is the one that
            was written.
        mmap: whether rows stay in their files, mapped, so that memory holds what look-ups touch and
            the system may drop it again. A file must not change while it is served from. With
            `verify` every byte is still read once, through a small buffer.

    Returns:
        A ServingModel for a model; for a collection alone a ServingEmbeddingBagCollection or
        ServingEmbeddingCollection, which stand where TorchRec's collections do.

    Raises:
        ArtefactError: the folder is missing, damaged, or of another version.
        ConfigError: it names a method that this embcomp does not have.
    """
    folder, on = Path(path), torch.device(device)
    config = ArtefactConfig.read(folder, verify=verify)
    make_rows = rows_class(rows, on)
    stored = find_tensors(folder)
    large = sum(tensor.nbytes for tensor in stored.values()) >= _LARGE
    with (
        checked(folder, config) if verify else nullcontext(),
        TensorReader(mapped=mmap, large=large) as reader,
    ):
        tensors = lazily(stored, config.tensors if verify else {}, reader)
        return _build(config, tensors, make_rows, on, str(folder / CONFIG_FILE))


def _build(
    config: ArtefactConfig,
    tensors: Mapping[str, ArtefactTensor],
    make_rows: MakeRows,
    on: torch.device,
    source: str,
) -> Serving:
    if config.model is None:
        if config.tables is None:
            raise ArtefactError(f"{source} describes neither tables nor a model")
        return _collection(config.tables, tensors, "tables", make_rows, on, source)
    return _model(config, config.model, tensors, make_rows, on, source)


def _own(tensors: Mapping[str, ArtefactTensor], role: str) -> dict[str, ArtefactTensor]:
    prefix = f"{role}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _collection(
    record: TablesRecord,
    tensors: Mapping[str, ArtefactTensor],
    role: str,
    make_rows: MakeRows,
    device: torch.device,
    source: str,
) -> ServingEmbeddingBagCollection | ServingEmbeddingCollection:
    kind = ServingEmbeddingBagCollection if record.kind == "pooled" else ServingEmbeddingCollection
    try:
        return kind(
            record,
            _own(tensors, role),
            make_rows=make_rows,
            device=device,
            source=f"{source}: {role}",
        )
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if source in text else f"{source}: {role}: {text}") from None


def _model(
    config: ArtefactConfig,
    record: ModelRecord,
    tensors: Mapping[str, ArtefactTensor],
    make_rows: MakeRows,
    device: torch.device,
    source: str,
) -> ServingModel:
    if record.name not in MODELS:
        raise ArtefactError(
            f"{source}: unknown model {record.name!r}{did_you_mean(record.name, MODELS)}; this "
            f"version has {listed(MODELS)}"
        )
    parts = {
        role: _collection(part, tensors, role, make_rows, device, source)
        for role, part in (("tables", config.tables), ("first_order", config.first_order))
        if part is not None
    }
    inputs = ModelInputs(
        feature_names=tuple(record.feature_names),
        embedding_dim=record.embedding_dim,
        num_dense=record.num_dense,
        pooling=record.pooling,
    )
    try:
        settings: Any = bind_dataclass(MODELS[record.name], dict(record.settings))
        with torch.random.fork_rng(devices=[]):  # drawn, then loaded
            network = settings.build(inputs, parts.get("tables"), parts.get("first_order"))
    except (PydanticCustomError, ConfigError) as error:
        raise ArtefactError(f"{source}: model {record.name!r}: {error}") from None
    dense = {
        name: tensor
        for name, tensor in persistent_tensors(network).items()
        if not name.startswith(("tables.", "first_order_tables."))
    }
    came = _own(tensors, "network")
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in dense.items()}
    check_shapes(wanted, came, f"{source}: network")
    for name, tensor in dense.items():
        came[name].read_into(tensor.detach())
    return ServingModel(network, record.feature_names, record.num_dense, device)
