"""A trained model made smaller where it is: each embedding collection becomes a compressed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module

from embcomp.backends.base import BackendConfig
from embcomp.collection.plan import Plan
from embcomp.compressing.approximation import check_approximates
from embcomp.compressing.approximation_error import CompressedTable, table_lines
from embcomp.compressing.model_tables import Include, ModelTables, find_tables
from embcomp.compressing.sharded_model import opened_shards, wrap_again
from embcomp.compressing.table_forms import TableForms, forms_of
from embcomp.layers.block_work import IN_MEMORY
from embcomp.tables.budget import SHARD_CODES_ABOVE

AnyMethods = Plan | BackendConfig | Mapping[str, BackendConfig]


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """What `compress_` did; as text, one line for each table.

    Attributes:
        model: the model; another module than was given only where that was a collection itself.
        tables: the compressed tables.
        notes: what else there is to know.
    """

    model: nn.Module
    tables: Sequence[CompressedTable]
    notes: Sequence[str] = field(default=())

    @property
    def full_bytes(self) -> int:
        """What the tables took."""
        return sum(table.full_bytes for table in self.tables)

    @property
    def bytes(self) -> int:
        """What they are served in now."""
        return sum(table.bytes for table in self.tables)

    def __str__(self) -> str:
        lines = table_lines(self.tables)
        widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines]
        total = f"{self.bytes:,} of {self.full_bytes:,} bytes ({self.bytes / self.full_bytes:.1%})"
        return "\n".join([*text, total, *self.notes])


def compress_(
    model: nn.Module,
    plan: AnyMethods,
    *,
    counts: Mapping[str, Tensor] | None = None,
    include: Include = None,
    seed: int = 0,
    folder: Path | None = None,
    shard_codes_above: str | int = SHARD_CODES_ABOVE,
) -> CompressionReport:
    """Replace a model's embedding collections by compressed ones with the best approximation of their rows.

    EmbeddingBagCollection, EmbeddingCollection, `nn.Embedding` and `nn.EmbeddingBag` are replaced, and
    our own collections of full tables, wherever they are in the model; nothing is changed unless all
    of them can be. The model answers at once, trains on, shards and exports as any other;
    DistributedModelParallel draws rows anew, so that its state dict is loaded into the sharded model.

    A DistributedModelParallel is compressed on all its ranks, each of which makes this call: rows go
    through files, block by block, so that no rank holds more than it held, and what comes out is
    sharded by TorchRec's planner, with the in-backward optimizers that the tables had. Optimizers and
    pipelines that were made for the model before are made anew, as its parameters are others.

    Args:
        model: a trained model, sharded by DistributedModelParallel or not at all.
        plan: a method for all tables, methods by table name, or a Plan; other tables stay full. A
            budget in bytes is shared by all collections in proportion to what they take.
        counts: by table, (num_embeddings,) how often each id is looked up. The ids of tables
            that are missing count alike.
        include: which collections: a regular expression found in their paths, or a function of path
            and module.
        seed: of what is drawn.
        folder: of a sharded model, where its tables' rows lie in files while this goes on; all ranks see
            it. The system's folder for temporary files by default.
        shard_codes_above: of a sharded model, bytes up to which a table's codes and bitmaps are on every
            rank; larger ones are dealt out, as by `shard_codes`.

    Raises:
        ConfigError: a method that cannot begin from trained rows, counts of another length, what is
            sharded in another way, nothing to compress.
        BudgetError: a budget below the floor.
        DataError: rows with NaN.
    """
    wanted = Plan.of(plan)
    check_approximates(wanted)
    own = counts or {}
    if isinstance(model, DistributedModelParallel):
        with opened_shards(model, include, folder, shard_codes_above) as shards:
            forms = forms_of(shards.found, wanted, counts=own, seed=seed, work=shards.work)
            made = shards.sharded(forms)
        inside = get_unwrapped_module(model)
    else:
        found = find_tables(model, include)
        forms = forms_of(found, wanted, counts=own, seed=seed, work=IN_MEMORY)
        made, inside = [_built(each) for each in forms], model
    notes = _tied(inside, [each.tables for each in forms])
    for each, module in zip(forms, made):
        module.train(each.tables.module.training)
        inside = _put(inside, each.tables.path, module)
    if isinstance(model, DistributedModelParallel):
        wrap_again(model, inside)
        inside = model
    tables = [line for each in forms for line in each.lines]
    return CompressionReport(model=inside, tables=tables, notes=notes)


@torch.no_grad()
def _built(forms: TableForms) -> nn.Module:
    """What takes a collection's place."""
    module, collection = forms.tables.build(forms.found.plan, None)
    collection.load_states(
        [replace(each, form=each.form.in_memory()) for each in forms.found.states]
    )
    return module


def _put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The model with a module at a path, and wherever else the one that was there stands."""
    if not path:
        return module
    old = model.get_submodule(path)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, module)
    return model


def _tied(model: nn.Module, found: Sequence[ModelTables]) -> list[str]:
    """Lines on parameters of what is replaced that other modules have as well, and keep."""
    replaced = {id(parameter) for each in found for parameter in each.module.parameters()}
    inside = {id(module) for each in found for module in each.module.modules()}
    return [
        f"{path}.{name} is the same tensor as a table's and stays as it is: its bytes are not saved"
        for path, module in model.named_modules()
        if id(module) not in inside
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in replaced
    ]
