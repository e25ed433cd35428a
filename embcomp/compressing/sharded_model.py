"""A sharded model's tables compressed where they are: read from their shards, and sharded again.

Rows go through files (`sharded_rows`), methods work on blocks of them that the ranks share (`FolderWork`, as
hand-overs of a training do), and each rank fills its part of what comes out. Nothing of the model is
changed before all of that is done.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardedModule, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig

from embcomp.collection.assembled import PooledTables, UnpooledTables
from embcomp.collection.sharded_codes import check_shard_codes_above, shard_codes
from embcomp.collection.torchrec_states import torchrec_state_dict
from embcomp.compressing.model_tables import (
    Include,
    ModelTables,
    find_tables,
    pooled_build,
    unpooled_build,
)
from embcomp.compressing.sharded_rows import raise_together, rows_of_shards
from embcomp.compressing.table_forms import TableForms
from embcomp.errors import ConfigError
from embcomp.layers.block_work import Work
from embcomp.layers.learned_buffers import overwriting
from embcomp.layers.row_sources import RowSource
from embcomp.tables.specs import specs_from_configs
from embcomp.training.distributed.process import Process
from embcomp.training.distributed.sharding_plan import Sharding, make_sharder, plan_sharding
from embcomp.training.stages.folder_work import BLOCK_COST, FolderWork
from embcomp.training.stages.start_files import fill_state
from embcomp.training.stages.work_progress import WorkProgress

_BATCH = 512  # rows, for the planner's estimates of buffers

Optimizer = tuple[type[torch.optim.Optimizer], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class OpenedShards:
    """The tables of a sharded model, readable by all ranks.

    Attributes:
        model: the model.
        found: its collections.
        work: shares blocks among the ranks.
        shard_codes_above: bytes up to which a table's codes and bitmaps will be on every rank.
    """

    model: DistributedModelParallel
    found: Sequence[ModelTables]
    work: Work
    shard_codes_above: str | int

    def sharded(self, forms: Sequence[TableForms]) -> list[nn.Module]:
        """What takes the collections' places, sharded and filled; every rank calls it.

        Args:
            forms: of all collections.

        Raises:
            ConfigError: the tables of a collection have several optimizers, or no placement.
        """
        built = [each.tables.build(each.found.plan, torch.device("meta")) for each in forms]
        holder = nn.ModuleList(module for module, _ in built)
        process = Process(dist.get_rank(), dist.get_world_size(), self.model.device)
        sharder = make_sharder(None)
        plans: dict[str, Any] = {}
        for number, (each, (module, collection)) in enumerate(zip(forms, built)):
            optimizer = _optimizer_of(each.tables)
            if optimizer is not None:
                kind, settings = optimizer
                for rows in collection.inner_collections():
                    apply_optimizer_in_backward(kind, rows.parameters(), settings)
            # Without a fused optimizer rows have gradients, as ordinary optimizers want them.
            way: Sharding = "table_wise" if optimizer is None else "auto"
            own = plan_sharding(
                module, sharder, process, way, _BATCH, "adagrad", {}, self.shard_codes_above
            )
            plans |= {
                f"{number}.{path}" if path else f"{number}": p for path, p in own.plan.items()
            }
        tensors: dict[str, Tensor | RowSource] = {}
        for number, (each, (module, collection)) in enumerate(zip(forms, built)):
            path = next(path for path, own in module.named_modules() if own is collection)
            prefix = ".".join(filter(None, [f"{number}", path]))
            found = collection.state_of(each.found.states)
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in found.items()}
        shard_codes(holder, above=self.shard_codes_above)  # which from then on have no whole
        made = DistributedModelParallel(
            holder,
            env=self.model._env,
            device=self.model.device,
            plan=ShardingPlan(plans),
            sharders=[sharder],
            init_data_parallel=False,
        )
        with torch.no_grad(), overwriting(made, set(tensors)):
            fill_state(made.state_dict(), tensors)
        return list(made.module)


@contextmanager
def opened_shards(
    model: DistributedModelParallel,
    include: Include,
    folder: Path | None,
    shard_codes_above: str | int,
) -> Iterator[OpenedShards]:
    """The tables of a sharded model while they lie in files; every rank calls it.

    Args:
        model: the model.
        include: which collections.
        folder: where a folder for the files is made, which goes again.
        shard_codes_above: as for `shard_codes`.

    Raises:
        ConfigError: nothing to compress, a model that is sharded in another way, or a folder that not all
            ranks see.
    """
    check_shard_codes_above(shard_codes_above, "shard_codes_above")
    if type(model) is not DistributedModelParallel or model.model_trackers:
        what = "has trackers of rows" if model.model_trackers else f"is a {type(model).__name__}"
        raise ConfigError(f"the model {what}; expected a plain DistributedModelParallel")
    group = model._env.process_group
    if group is None or group.size() != dist.get_world_size():
        raise ConfigError("the model is sharded over some of the ranks; expected all of them")
    with _shared_folder(folder) as place:
        shards: list[Path] = []

        def read(path: str, module: nn.Module) -> ModelTables:
            shards.append(place / f"shards-{len(shards)}")
            return _read_sharded(path, module, shards[-1])

        found = find_tables(get_unwrapped_module(model), include, read)
        process = Process(dist.get_rank(), dist.get_world_size(), model.device)
        progress = WorkProgress("compress_", lambda line: None)
        with FolderWork(place / "work", process, BLOCK_COST, progress) as work:
            yield OpenedShards(
                model=model, found=found, work=work, shard_codes_above=shard_codes_above
            )


@contextmanager
def _shared_folder(parent: Path | None) -> Iterator[Path]:
    """A folder that all ranks see, gone when all of them are done."""
    said: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            said = [tempfile.mkdtemp(prefix="embcomp-compress-", dir=parent), None]
        except OSError as error:
            said = [None, f"folder: {parent or tempfile.gettempdir()}: {error.strerror}"]
    dist.broadcast_object_list(said, src=0)
    raise_together(said[1])
    place = Path(said[0])
    try:
        seen = place.is_dir()
        way = "give one that is on all hosts as `folder`"
        raise_together(None if seen else f"rank {dist.get_rank()} does not see {place}: {way}")
        yield place
    finally:
        dist.barrier()  # a rank that failed has told the others, who look for that in the folder
        if dist.get_rank() == 0:
            shutil.rmtree(place, ignore_errors=True)


def _read_sharded(path: str, module: nn.Module, folder: Path) -> ModelTables:
    configs: list[EmbeddingBagConfig] | list[EmbeddingConfig]
    nowhere = torch.device("meta")
    if isinstance(module, ShardedEmbeddingBagCollection):
        configs, kind = module._embedding_bag_configs, "embedding_bags"
        build = pooled_build(configs, nowhere, is_weighted=module._is_weighted)
    elif isinstance(module, ShardedEmbeddingCollection):
        configs, kind = module._embedding_configs, "embeddings"
        build = unpooled_build(configs, nowhere, need_indices=module._need_indices)
    elif isinstance(module, PooledTables):
        configs, kind = module.embedding_bag_configs(), module.torchrec_kind
        build = pooled_build(configs, nowhere, is_weighted=module.is_weighted())
    elif isinstance(module, UnpooledTables):
        configs, kind = module.embedding_configs(), module.torchrec_kind
        build = unpooled_build(configs, nowhere, need_indices=module.need_indices())
    else:
        raise ConfigError(
            f"{path}: {type(module).__name__} has no compressed counterpart; leave it out with `include`"
        )
    state = torchrec_state_dict(module)
    weights = {config.name: state[f"{kind}.{config.name}.weight"] for config in configs}
    return ModelTables(
        path=path,
        module=module,
        specs=specs_from_configs(configs),
        rows=rows_of_shards(weights, folder),
        build=build,
    )


def _optimizer_of(tables: ModelTables) -> Optimizer | None:
    """The optimizer that updates a collection's rows in the backward pass; None where none does."""
    found: list[Optimizer | None] = []
    for module in tables.module.modules():
        infos = getattr(module, "sharding_type_to_sharding_infos", {})
        for info in (info for own in infos.values() for info in own):
            kinds = getattr(info.param, "_optimizer_classes", None)
            if not kinds or not kinds[0]:
                found.append(None)
                continue
            (settings,) = info.param._optimizer_kwargs
            # The kernel's own name for the class is not the class's argument.
            own = {name: value for name, value in settings.items() if name != "optimizer"}
            found.append((kinds[0], own))
    if any(each != found[0] for each in found):
        raise ConfigError(
            f"{tables.path or 'the model'}: its tables have different in-backward optimizers, and "
            "compressed tables share rows; compress collections of one optimizer"
        )
    return found[0] if found else None


def wrap_again(model: DistributedModelParallel, inside: nn.Module) -> None:
    """Put what is to be in a DistributedModelParallel there, data-parallel as it was.

    Args:
        model: the model.
        inside: what it wraps, all its collections sharded.
    """
    was_wrapped = model._ddp_wrapped
    model._dmp_wrapped_module = inside  # and with what wrapped it, its hooks are gone
    gc.collect()
    model._optim = model._init_optim(inside)
    plans: dict[str, EmbeddingModuleShardingPlan] = {
        path: own.module_sharding_plan
        for path, own in inside.named_modules()
        if isinstance(own, ShardedModule) and hasattr(own, "module_sharding_plan")
    }
    model._plan = ShardingPlan(plans)
    model._ddp_wrapped = False
    if was_wrapped:
        model.init_data_parallel()
