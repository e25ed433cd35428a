"""Artefacts: a collection or a whole CTR model in its serving form, as a folder.

    config.json         what it is, versioned
    model.safetensors   tables under `tables.`, first-order ones under `first_order.`, the
                        network under `network.`; of a large artefact several files and an index
    dataset.json        features and counts of the dataset, where there is one
    vocabulary/         from raw values to ids, where the dataset has them

Nothing pruned is stored and no mask; the bytes under `tables.` are the footprint's serving bytes.
Nothing is pickled. A folder is complete or not there, and an existing one is never touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.collection.sourced import SourcedTables
from embcomp.collection.table_row_types import RowTypes
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ArtefactError, BudgetError, ConfigError
from embcomp.io.tensor_writing import write_tensors
from embcomp.io.yaml_reading import plain
from embcomp.layers.named_parts import persistent_tensors
from embcomp.models import MODELS, ModelConfig, ModelInputs
from embcomp.serving.artefact_config import (
    CONFIG_FILE,
    TENSORS_FILE,
    ArtefactConfig,
    ModelRecord,
)
from embcomp.serving.artefact_folder import (
    RewrittenDataset,
    bytes_by_role,
    copy_dataset,
    new_folder,
)
from embcomp.serving.artefact_integrity import check_vocabularies, with_checksums
from embcomp.serving.artefact_loading import load
from embcomp.serving.artefact_parity import check_answers, sampled_batches
from embcomp.serving.artefact_parts import ArtefactPart, ServingForms, network_tensors
from embcomp.serving.programs.forms import Form, FormBatch, check_form, check_forms, write_form
from embcomp.tables.budget import parse_budget

Collection = CompressedEmbeddingBagCollection | CompressedEmbeddingCollection
Extra = Callable[[Path, ArtefactConfig], ArtefactConfig]
MAX_FILE_SIZE = "4GiB"
"""Bytes of tensors in a file, unless a caller says otherwise."""
AnyRowTypes = str | Mapping[str, str] | RowTypes


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What `save` wrote.

    Attributes:
        path: the folder.
        config: its description.
        row_error: for `tables` and `first_order`, the largest error of a weight in each
            physical table whose rows are not float32.
        answer_error: of a collection alone, for each table, how far a weight of the artefact's
            answers is from the collection's, over ids sampled from the whole table.
    """

    path: Path
    config: ArtefactConfig
    row_error: Mapping[str, Mapping[str, float]]
    answer_error: Mapping[str, float] = field(default_factory=dict)


def save(
    collection: Collection,
    path: str | Path,
    *,
    row_type: AnyRowTypes = "fp32",
    budget: str | int | None = None,
    max_file_size: str | int = MAX_FILE_SIZE,
    counts: Mapping[str, Tensor] | None = None,
    formats: Sequence[Form] = (),
) -> Saved:
    """Write a collection's serving form, which `load` reads back, and compare its answers.

    Args:
        collection: an unsharded one; it is compacted here, and itself left as it is.
        path: the folder to make.
        row_type: `fp32`, `fp16`, `int8` or `int4`, for every method's rows; or a mapping
            from table to type, in which `default` stands for the others.
        budget: serving bytes that the tables may take.
        max_file_size: bytes of tensors in a file, as `4GiB`; larger artefacts have several files and
            an index. A tensor is never split.
        counts: as for `compact`. Who gives them wants the rows that a method's budget prunes to
            go, so the artefact is compared with the compacted collection.
        formats: programs to write beside the tensors, for bags: `pt2`, `onnx`, `aoti`, `tables`.

    Raises:
        ConfigError: a type or a table does not exist, or tables that share rows have several types.
        ArtefactError: the folder exists already, or a format cannot be written here or of these tables.
        BudgetError: the tables are larger than the budget; nothing is left.
        ParityError: the serving form answers otherwise than the collection; nothing is left.
    """
    check_forms(formats)
    wanted = RowTypes.of(row_type)
    _check_collection(collection)
    wanted.check([table.name for table in collection.plan.tables])
    compacted = collection.compact(counts)
    part = ArtefactPart.of(compacted, wanted, "tables")
    whole = collection if counts is None else compacted
    errors: dict[str, float] = {}

    def compare(folder: Path, config: ArtefactConfig) -> ArtefactConfig:
        types = part.record.row_types
        serving = load(folder, rows="torch", mmap=True)
        errors.update(check_answers(whole, compacted, serving, types))
        for form in formats:
            config = write_form(form, serving, folder, config, bags=True)
            sampled = sampled_batches(whole.plan, is_weighted=False)
            batches = [FormBatch(torch.zeros(own.stride(), 0), own) for own in sampled]
            check_form(form, folder, serving, batches, bags=True)
        return config

    saved = _write(
        Path(path),
        {"tables": part},
        {},
        row_type=wanted,
        budget=_budget(budget, collection),
        model=None,
        info=None,
        extra=compare,
        file_bytes=_file_bytes(max_file_size),
    )
    return dataclasses.replace(saved, answer_error=errors)


def save_forms(
    forms: ServingForms,
    path: Path,
    *,
    row_type: RowTypes,
    budget: int | None,
    extra: Extra | None = None,
    max_file_size: str | int = MAX_FILE_SIZE,
) -> Saved:
    """Write pooled tables that are in their serving forms already, and may be larger than memory.

    Args:
        forms: the tables.
        path: the folder to make.
        row_type: how rows are to be stored.
        budget: serving bytes that the tables may take.
        extra: as for `save_model`.
        max_file_size: as for `save`.
    """
    return _write(
        path,
        {"tables": ArtefactPart.of(forms, row_type, "tables")},
        {},
        row_type=row_type,
        budget=budget,
        model=None,
        info=None,
        extra=extra,
        file_bytes=_file_bytes(max_file_size),
    )


def save_model(
    model: nn.Module,
    path: str | Path,
    *,
    settings: ModelConfig,
    inputs: ModelInputs,
    row_type: AnyRowTypes = "fp32",
    budget: str | int | None = None,
    dataset: DatasetInfo | None = None,
    rewritten: RewrittenDataset | None = None,
    extra: Extra | None = None,
    max_file_size: str | int = MAX_FILE_SIZE,
) -> Saved:
    """Write a CTR model of `embcomp.models` with its tables' serving forms.

    Args:
        model: unsharded, as `settings.build` made it around compressed collections, or `SourcedTables`
            in their place.
        path: the folder to make.
        settings: the model's.
        inputs: what it was built for.
        row_type: as for `save`; a table's first-order weights have its type.
        budget: serving bytes that the embedding tables may take, first-order ones not counted.
        dataset: whose description and vocabularies go along.
        rewritten: what of them differs.
        extra: is called with the folder and its description before the folder gets its name. It
            may read the artefact, write further files and describe them, or raise.
        max_file_size: as for `save`.
    """
    wanted = RowTypes.of(row_type)
    children = dict(model.named_children())
    parts: dict[str, ArtefactPart] = {}
    for role, child in (("tables", "tables"), ("first_order", "first_order_tables")):
        collection = children.get(child)
        if collection is None:
            continue
        if not isinstance(collection, (CompressedEmbeddingBagCollection, SourcedTables)):
            raise ArtefactError(
                f"the model's {child} are a {type(collection).__name__}; expected a "
                "CompressedEmbeddingBagCollection, unsharded"
            )
        wanted.check([table.name for table in collection.plan.tables])
        parts[role] = ArtefactPart.of(collection.compact(), wanted, role)
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
    allowed = _budget(budget, main) if isinstance(main, (*_COLLECTIONS, SourcedTables)) else None
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
        file_bytes=_file_bytes(max_file_size),
    )


_COLLECTIONS = (CompressedEmbeddingBagCollection, CompressedEmbeddingCollection)


def _check_collection(collection: object) -> None:
    if not isinstance(collection, _COLLECTIONS):
        raise ArtefactError(
            "expected a CompressedEmbeddingBagCollection or CompressedEmbeddingCollection, "
            f"got {type(collection).__name__}"
        )


def _file_bytes(size: str | int) -> int:
    found = parse_budget(size, name="max_file_size")
    if not found:
        raise ConfigError(f"max_file_size: expected bytes, as '4GiB'; got the share {size!r}")
    return found


def _budget(budget: str | int | None, collection: Collection | SourcedTables) -> int | None:
    if budget is None:
        return None
    return parse_budget(budget, full_bytes=collection.plan.full_bytes)


def _write(
    path: Path,
    parts: Mapping[str, ArtefactPart],
    network: Mapping[str, Tensor],
    *,
    row_type: RowTypes,
    budget: int | None,
    model: ModelRecord | None,
    info: DatasetInfo | None,
    rewritten: RewrittenDataset | None = None,
    extra: Extra | None = None,
    file_bytes: int,
) -> Saved:
    tensors = [*network_tensors(network), *(new for part in parts.values() for new in part.tensors)]
    sizes = bytes_by_role({tensor.name: tensor for tensor in tensors})
    with new_folder(path) as folder:
        if budget is not None and sizes.get("tables", 0) > budget:
            raise BudgetError(
                f"the tables take {sizes['tables']:,} bytes as {row_type} rows, over the budget of "
                f"{budget:,} bytes; nothing was written. Export narrower rows (int8, int4) or "
                "widths, or raise the budget"
            )
        checksums = write_tensors(folder, TENSORS_FILE, tensors, file_bytes=file_bytes)
        dataset = None if info is None else copy_dataset(info, rewritten, folder)
        config = ArtefactConfig(
            embcomp_version=version("embcomp"),
            row_type=row_type.plain(),
            tables=parts["tables"].record if "tables" in parts else None,
            first_order=parts["first_order"].record if "first_order" in parts else None,
            model=model,
            dataset=dataset,
            budget=budget,
            network_bytes=sizes.get("network", 0),
        )
        if info is not None:
            check_vocabularies(config, info if rewritten is None else rewritten.info, path)
        config = _write_config(folder, config, checksums)
        if extra is not None:
            config = _write_config(folder, extra(folder, config), checksums)
    errors = {role: part.row_error for role, part in parts.items()}
    return Saved(path=path, config=config, row_error=errors)


def _write_config(
    folder: Path, config: ArtefactConfig, checksums: Mapping[str, str]
) -> ArtefactConfig:
    """Describe all that is in the folder; returns the description with its digest."""
    text = with_checksums(config, folder, checksums).to_json()
    (folder / CONFIG_FILE).write_bytes(text.encode("utf-8"))
    return ArtefactConfig.read(folder)
