"""The embedding collections in a model that can be compressed, whoever's they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from embcomp.collection.assembled import AssembledTables
from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.collection.plan import UNCOMPRESSED, ResolvedPlan
from embcomp.compressing.torch_lookups import (
    CompressedEmbedding,
    CompressedEmbeddingBag,
    check_embedding,
    config_of,
)
from embcomp.errors import ConfigError
from embcomp.layers.row_sources import MemoryRows, RowSource
from embcomp.tables.specs import TableSpec, specs_from_configs

Include = str | Callable[[str, nn.Module], bool] | None
Collection = CompressedEmbeddingBagCollection | CompressedEmbeddingCollection
Build = Callable[[ResolvedPlan, torch.device | None], tuple[nn.Module, Collection]]
ReadSharded = Callable[[str, nn.Module], "ModelTables"]


@dataclass(frozen=True, kw_only=True)
class ModelTables:
    """A collection in a model.

    Args:
        path: its name there; empty for the model itself.
        module: the collection.
        specs: its tables.
        rows: their rows by name, without padding.
        build: from the plan of its tables and a device, or None for the collection's own, what takes its
            place, and the compressed collection in it.
    """

    path: str
    module: nn.Module
    specs: list[TableSpec]
    rows: Mapping[str, RowSource]
    build: Build


def find_tables(
    model: nn.Module, include: Include, read_sharded: ReadSharded | None = None
) -> list[ModelTables]:
    """The collections of a model.

    Args:
        model: any module.
        include: a regular expression found in a collection's path, or a function of path and module;
            None takes all.
        read_sharded: reads a collection of which each rank holds a part; None where none may be.

    Raises:
        ConfigError: something is sharded that may not be, nothing was found, or what was found cannot
            be compressed.
    """
    wanted = _wanted(include)
    found: list[ModelTables] = []
    seen: list[str] = []
    known: set[int] = set()
    for path, module in _collections(model, sharded=read_sharded is not None):
        if id(module) in known:  # it stands in several places
            continue
        known.add(id(module))
        seen.append(f"{path or 'the model itself'} ({type(module).__name__})")
        if wanted(path, module):
            is_sharded = any(isinstance(each, ShardedModule) for each in module.modules())
            read = read_sharded if is_sharded and read_sharded is not None else _read
            found.append(read(path, module))
    if not found:
        kinds = "EmbeddingBagCollection, EmbeddingCollection, nn.Embedding or nn.EmbeddingBag"
        said = f"include chooses none of {', '.join(seen)}" if seen else f"there is no {kinds}"
        raise ConfigError(f"{type(model).__name__}: nothing to compress: {said}")
    return found


def _wanted(include: Include) -> Callable[[str, nn.Module], bool]:
    if include is None:
        return lambda path, module: True
    if not isinstance(include, str):
        return include
    try:
        pattern = re.compile(include)
    except re.error as error:
        raise ConfigError(f"include: {include!r} is no regular expression: {error}") from None
    return lambda path, module: pattern.search(path) is not None


def _collections(
    model: nn.Module, path: str = "", *, sharded: bool
) -> Iterator[tuple[str, nn.Module]]:
    """The collections in a module, none inside another, one that stands twice only once a place."""
    refused = (DistributedModelParallel,) if sharded else (DistributedModelParallel, ShardedModule)
    if isinstance(model, refused):
        raise ConfigError(
            f"{path or 'the model'} is sharded ({type(model).__name__}): give `compress_` the "
            "DistributedModelParallel that shards the whole model, on all ranks"
        )
    if _is_collection(model):
        yield path, model
    elif not isinstance(model, AssembledTables):
        for name, child in model.named_children():
            yield from _collections(child, f"{path}.{name}" if path else name, sharded=sharded)


def _is_collection(module: nn.Module) -> bool:
    if isinstance(module, (CompressedEmbeddingBagCollection, CompressedEmbeddingCollection)):
        return all(method == UNCOMPRESSED for method in module.plan.methods.values())
    if isinstance(module, ShardedModule):
        return True
    kinds = (EmbeddingBagCollection, EmbeddingCollection, nn.Embedding, nn.EmbeddingBag)
    return isinstance(module, kinds) and not isinstance(module, AssembledTables)


def pooled_build(
    configs: list[EmbeddingBagConfig], own: torch.device, *, is_weighted: bool
) -> Build:
    """Builds what takes the place of a collection of bags."""

    def build(plan: ResolvedPlan, device: torch.device | None) -> tuple[nn.Module, Collection]:
        made = CompressedEmbeddingBagCollection(
            configs, plan, is_weighted=is_weighted, device=device or own
        )
        return made, made

    return build


def unpooled_build(
    configs: list[EmbeddingConfig], own: torch.device, *, need_indices: bool
) -> Build:
    """Builds what takes the place of a collection without pooling."""

    def build(plan: ResolvedPlan, device: torch.device | None) -> tuple[nn.Module, Collection]:
        made = CompressedEmbeddingCollection(
            configs, plan, device or own, need_indices=need_indices
        )
        return made, made

    return build


def _read(path: str, module: nn.Module) -> ModelTables:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return _of_torch(path, module)
    configs: list[EmbeddingBagConfig] | list[EmbeddingConfig]
    if isinstance(module, (EmbeddingBagCollection, CompressedEmbeddingBagCollection)):
        configs = module.embedding_bag_configs()
        build = pooled_build(configs, module.device, is_weighted=module.is_weighted())
    else:
        assert isinstance(module, (EmbeddingCollection, CompressedEmbeddingCollection))
        configs = module.embedding_configs()
        build = unpooled_build(configs, module.device, need_indices=module.need_indices())
    specs = specs_from_configs(configs)
    rows = {name: MemoryRows(weight.cpu()) for name, weight in _weights(module).items()}
    return ModelTables(path=path, module=module, specs=specs, rows=rows, build=build)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    if isinstance(module, EmbeddingBagCollection):
        return {name: bag.weight.detach() for name, bag in module.embedding_bags.items()}
    if isinstance(module, EmbeddingCollection):
        return {name: table.weight.detach() for name, table in module.embeddings.items()}
    assert isinstance(module, (CompressedEmbeddingBagCollection, CompressedEmbeddingCollection))
    return {
        name.removeprefix("rows."): tensor
        for each in module.states()
        for name, tensor in each.form.tensors.items()
        if name.startswith("rows.")
    }


def _of_torch(path: str, module: nn.Embedding | nn.EmbeddingBag) -> ModelTables:
    check_embedding(path or "the model itself", module)
    name = path.replace(".", "_") or "table"
    name = f"table_{name}" if name[0].isdigit() else name
    config = config_of(name, module)
    weight = module.weight.detach()
    if not weight.is_floating_point():
        raise ConfigError(f"{path}: expected rows of floats, got {weight.dtype}")

    def build(plan: ResolvedPlan, device: torch.device | None) -> tuple[nn.Module, Collection]:
        on = device or torch.device(weight.device)
        if isinstance(module, nn.EmbeddingBag):
            bags = CompressedEmbeddingBagCollection([config], plan, is_weighted=True, device=on)
            return CompressedEmbeddingBag(bags, module), bags
        single = CompressedEmbeddingCollection([config], plan, on)
        return CompressedEmbedding(single, name, weight.dtype, module.padding_idx), single

    return ModelTables(
        path=path,
        module=module,
        specs=specs_from_configs([config]),
        rows={name: MemoryRows(weight.cpu().float())},
        build=build,
    )
