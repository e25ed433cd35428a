"""Artefacts: a collection or a whole CTR model in its serving form, as a folder.

    config.json         what it is, versioned
    model.safetensors   tables under ``tables.``, first-order ones under ``first_order.``, the
                        network under ``network.``
    dataset.json        features and counts of the dataset, where there is one
    vocabulary/         from raw values to ids, where the dataset has them

Nothing pruned is stored and no mask; the bytes under ``tables.`` are the footprint's serving bytes.
Nothing is pickled. A folder is complete or not there, and an existing one is never touched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import polars as pl
import safetensors.torch
import torch
from pydantic_core import PydanticCustomError
from safetensors import SafetensorError
from torch import Tensor, nn

from embcomp.artefact_config import (
    CONFIG_FILE,
    TENSORS_FILE,
    ArtefactConfig,
    DatasetRecord,
    ModelRecord,
    TablesRecord,
)
from embcomp.budget import parse_budget
from embcomp.collection import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from embcomp.config_reading import bind_dataclass, did_you_mean, listed, plain
from embcomp.data_pipelines.schema import FILE_NAME as DATASET_FILE
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ArtefactError, BudgetError, ConfigError
from embcomp.models import MODELS, ModelConfig, ModelInputs
from embcomp.row_types import (
    RowType,
    check_row_type,
    largest_error,
    pack,
    row_types,
    served_footprint,
)
from embcomp.serving import (
    MakeRows,
    ServingEmbeddingBagCollection,
    ServingEmbeddingCollection,
    ServingModel,
    check_shapes,
    persistent_tensors,
    rows_class,
)

Collection = CompressedEmbeddingBagCollection | CompressedEmbeddingCollection
Serving = ServingEmbeddingBagCollection | ServingEmbeddingCollection | ServingModel
Extra = Callable[[Path, ArtefactConfig], ArtefactConfig]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What `save` wrote.

    Attributes:
        path: The folder.
        config: Its description.
        row_error: For ``tables`` and ``first_order``, the largest error of a weight in each
            physical table whose rows are not float32.
    """

    path: Path
    config: ArtefactConfig
    row_error: Mapping[str, Mapping[str, float]]


def save(
    collection: Collection,
    path: str | Path,
    *,
    row_type: RowType = "fp32",
    budget: str | int | None = None,
) -> Saved:
    """Write a collection's serving form; `load` reads it back.

    Args:
        collection: an unsharded one; it is compacted here, and itself left as it is.
        path: the folder to make.
        row_type: ``fp32``, ``fp16``, ``int8`` or ``int4``, for every method's rows.
        budget: serving bytes that the tables may take.

    Raises:
        ArtefactError: the folder exists already.
        BudgetError: the tables are larger than the budget; nothing is left.
    """
    part = _Part.of(collection, check_row_type(row_type))
    allowed = _budget(budget, collection)
    return _write(
        Path(path), {"tables": part}, {}, row_type=row_type, budget=allowed, model=None, info=None
    )


def save_model(
    model: nn.Module,
    path: str | Path,
    *,
    settings: ModelConfig,
    inputs: ModelInputs,
    row_type: RowType = "fp32",
    budget: str | int | None = None,
    dataset: DatasetInfo | None = None,
    rewritten: RewrittenDataset | None = None,
    extra: Extra | None = None,
) -> Saved:
    """Write a CTR model of `embcomp.models` with its tables' serving forms.

    Args:
        model: unsharded, as ``settings.build`` made it around compressed collections.
        path: the folder to make.
        settings: the model's.
        inputs: what it was built for.
        row_type: as for `save`.
        budget: serving bytes that the embedding tables may take, first-order ones not counted.
        dataset: whose description and vocabularies go along.
        rewritten: what of them differs.
        extra: is called with the folder and its description before the folder gets its name. It
            may read the artefact, write further files and describe them, or raise.
    """
    wanted = check_row_type(row_type)
    children = dict(model.named_children())
    parts: dict[str, _Part] = {}
    for role, child in (("tables", "tables"), ("first_order", "first_order_tables")):
        collection = children.get(child)
        if collection is None:
            continue
        if not isinstance(collection, CompressedEmbeddingBagCollection):
            raise ArtefactError(
                f"the model's {child} are a {type(collection).__name__}; expected a "
                "CompressedEmbeddingBagCollection, unsharded"
            )
        parts[role] = _Part.of(collection, wanted)
    network = {
        name: tensor.detach()
        for name, tensor in persistent_tensors(model).items()
        if not name.startswith(("tables.", "first_order_tables."))
    }
    names = {type_: name for name, type_ in MODELS.items()}
    if type(settings) not in names:
        raise ArtefactError(f"{type(settings).__name__} is not one of embcomp.models.MODELS")
    record = ModelRecord(
        name=names[type(settings)],
        settings=plain(dataclasses.asdict(settings)),
        feature_names=list(inputs.feature_names),
        embedding_dim=inputs.embedding_dim,
        num_dense=inputs.num_dense,
        pooling=inputs.pooling,
    )
    main = children.get("tables")
    allowed = _budget(budget, main) if isinstance(main, _COLLECTIONS) else None
    return _write(
        Path(path),
        parts,
        network,
        row_type=wanted,
        budget=allowed,
        model=record,
        info=dataset,
        rewritten=rewritten,
        extra=extra,
    )


_COLLECTIONS = (CompressedEmbeddingBagCollection, CompressedEmbeddingCollection)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A compacted collection, its tensors as they are stored."""

    record: TablesRecord
    tensors: Mapping[str, Tensor]
    predicted: int
    row_error: Mapping[str, float]

    @classmethod
    def of(cls, collection: Collection, wanted: RowType) -> _Part:
        if not isinstance(collection, _COLLECTIONS):
            raise ArtefactError(
                "expected a CompressedEmbeddingBagCollection or CompressedEmbeddingCollection, "
                f"got {type(collection).__name__}"
            )
        compacted = collection.compact()
        types: dict[str, RowType] = {}
        tensors: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        for index, (each, group) in enumerate(zip(compacted.forms(), compacted.groups)):
            physical = group.backend.physical_tables
            own = row_types(physical, wanted)
            types |= own
            for name, tensor in each.form.tensors.items():
                part, _, rest = name.partition(".")
                if part != "rows":
                    tensors[f"{part}.{index}.{rest}"] = tensor.detach().cpu().contiguous()
                    continue
                rows = tensor.detach().cpu()
                tensors[name] = pack(rows, own[rest])
                if own[rest] != "fp32":
                    errors[rest] = largest_error(rows, tensors[name], own[rest])
        kind: Literal["pooled", "unpooled"] = "unpooled"
        is_weighted = need_indices = False
        if isinstance(compacted, CompressedEmbeddingBagCollection):
            kind, is_weighted = "pooled", compacted.is_weighted()
        else:
            need_indices = compacted.need_indices()
        predicted = served_footprint(compacted.footprint, types).serve_bytes
        record = TablesRecord.of(
            compacted.plan,
            types,
            kind=kind,
            is_weighted=is_weighted,
            need_indices=need_indices,
            size=predicted,
        )
        return cls(record=record, tensors=tensors, predicted=predicted, row_error=errors)


def _budget(budget: str | int | None, collection: Collection) -> int | None:
    if budget is None:
        return None
    return parse_budget(budget, full_bytes=collection.plan.full_bytes)


def _write(
    path: Path,
    parts: Mapping[str, _Part],
    network: Mapping[str, Tensor],
    *,
    row_type: RowType,
    budget: int | None,
    model: ModelRecord | None,
    info: DatasetInfo | None,
    rewritten: RewrittenDataset | None = None,
    extra: Extra | None = None,
) -> Saved:
    tensors = {
        f"{role}.{name}": t for role, part in parts.items() for name, t in part.tensors.items()
    }
    tensors |= {f"network.{name}": t.cpu().clone().contiguous() for name, t in network.items()}
    with new_folder(path) as folder:
        file = folder / TENSORS_FILE
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
        sizes = header_bytes(file)
        for role, part in parts.items():
            measured = sizes.get(role, 0)
            assert measured == part.predicted, (
                f"{role} take {measured} bytes in the file, {part.predicted} were predicted"
            )
        if budget is not None and sizes.get("tables", 0) > budget:
            raise BudgetError(
                f"the tables take {sizes['tables']:,} bytes as {row_type} rows, over the budget of "
                f"{budget:,} bytes; nothing was written. Export narrower rows (int8, int4) or "
                "widths, or raise the budget"
            )
        dataset = None if info is None else _copy_dataset(info, rewritten, folder)
        config = ArtefactConfig(
            embcomp_version=version("embcomp"),
            row_type=row_type,
            tables=parts["tables"].record if "tables" in parts else None,
            first_order=parts["first_order"].record if "first_order" in parts else None,
            model=model,
            dataset=dataset,
            budget=budget,
            network_bytes=sizes.get("network", 0),
            sha256=_sha256(file),
        )
        _write_config(folder, config)
        if extra is not None:
            config = extra(folder, config)
            _write_config(folder, config)
    errors = {role: part.row_error for role, part in parts.items()}
    return Saved(path=path, config=config, row_error=errors)


def _write_config(folder: Path, config: ArtefactConfig) -> None:
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes it when all went well.

    Raises:
        ArtefactError: something is there already, or cannot be made there.
    """
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp keeps others out
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                _flush(file)
        _refuse_existing(path)
        folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise ArtefactError(f"{path} exists and is left as it is; remove it or name another folder")


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def header_bytes(file: Path) -> dict[str, int]:
    """Bytes of a safetensors file's tensors by the first part of their names, from its header."""
    sizes: dict[str, int] = {}
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            role = name.partition(".")[0]
            sizes[role] = sizes.get(role, 0) + stop - start
    return sizes


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(info: DatasetInfo) -> str:
    """The SHA-256 of a dataset's `dataset.json`."""
    return hashlib.sha256((info.folder / DATASET_FILE).read_bytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class RewrittenDataset:
    """What an artefact says of its dataset when ids were numbered anew.

    Attributes:
        info: The description with the new counts.
        vocabularies: By feature, the new columns id, value, count; other features keep theirs.
    """

    info: DatasetInfo
    vocabularies: Mapping[str, pl.DataFrame]


def _copy_dataset(
    info: DatasetInfo, rewritten: RewrittenDataset | None, folder: Path
) -> DatasetRecord:
    """The dataset without its rows: description and vocabularies, which encode raw values."""
    copied = (info if rewritten is None else rewritten.info).model_copy(deep=True)
    vocabularies = {} if rewritten is None else rewritten.vocabularies
    for split in copied.splits.values():
        split.files = []
    copied.save(folder)
    for feature in copied.categorical:
        if feature.vocabulary:
            target = folder / feature.vocabulary
            target.parent.mkdir(parents=True, exist_ok=True)
            if feature.name in vocabularies:
                vocabularies[feature.name].write_parquet(target)
            else:
                shutil.copyfile(info.folder / feature.vocabulary, target)
    return DatasetRecord(
        name=info.name, fingerprint=fingerprint(info), renumbered=sorted(vocabularies)
    )


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    rows: Literal["auto", "fbgemm", "torch"] = "auto",
    verify: bool = False,
) -> Serving:
    """Read an artefact as a module that answers; no training code is imported.

    Args:
        path: the artefact's folder.
        device: where to serve.
        rows: what reads the rows: FBGEMM's inference kernel (CPU), plain torch operations, or
            whichever is faster there.
        verify: whether to compare the tensors' file with its SHA-256.

    Returns:
        A ServingModel for a model; for a collection alone a ServingEmbeddingBagCollection or
        ServingEmbeddingCollection, which stand where TorchRec's collections do.

    Raises:
        ArtefactError: the folder is missing, damaged, or of another version.
        ConfigError: it names a method that this embcomp does not have.
    """
    folder, on = Path(path), torch.device(device)
    config = ArtefactConfig.read(folder)
    tensors = read_tensors(folder, config, verify=verify)
    make_rows, source = rows_class(rows, on), str(folder / CONFIG_FILE)
    if config.model is None:
        if config.tables is None:
            raise ArtefactError(f"{source} describes neither tables nor a model")
        return _collection(config.tables, tensors, "tables", make_rows, on, source)
    return _model(config, config.model, tensors, make_rows, on, source)


def read_tensors(folder: Path, config: ArtefactConfig, *, verify: bool) -> dict[str, Tensor]:
    """The tensors of an artefact, by their names in the file.

    Args:
        folder: the artefact's.
        config: its description.
        verify: whether to compare the file with its SHA-256.
    """
    file = folder / TENSORS_FILE
    if not file.is_file():
        raise ArtefactError(f"{folder} has no {TENSORS_FILE}; copy the whole folder")
    if verify and _sha256(file) != config.sha256:
        raise ArtefactError(f"{file} is damaged: its SHA-256 is not the one in {CONFIG_FILE}")
    try:
        return safetensors.torch.load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise ArtefactError(f"{file} is damaged ({error}); export the run again") from None


def _own(tensors: Mapping[str, Tensor], role: str) -> dict[str, Tensor]:
    prefix = f"{role}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _collection(
    record: TablesRecord,
    tensors: Mapping[str, Tensor],
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
    tensors: Mapping[str, Tensor],
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
    with torch.no_grad():
        for name, tensor in dense.items():
            tensor.copy_(came[name])
    return ServingModel(network, record.feature_names, record.num_dense, device)
