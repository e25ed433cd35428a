"""Whole models in TorchRec's names, for checkpoints that its own collections wrote or are to read.

A checkpoint of TorchRec's is read into `torchrec_state_dict`, sharded as it may be, which
`load_state_dict` takes as it is; the state of fused optimizers goes the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from embcomp.collection.assembled import AssembledTables
from embcomp.collection.torchrec_keys import (
    give_back,
    narrowed,
    torchrec_key,
    whole_tables,
    widened,
)

_WRAPPED = ("_dmp_wrapped_module", "_fsdp_wrapped_module")


def torchrec_state_dict(model: nn.Module) -> dict[str, Any]:
    """A model's state dict in which tables that are held whole have TorchRec's names and widths.

    It is what `torch.distributed.checkpoint` saves and reads in place; what was read goes to the model
    by its `load_state_dict`. Tensors are the model's own, but for sharded ones that are padded, of which
    it has copies. Tables that are not held whole, and what methods have learnt, keep the collections'
    own names.

    Args:
        model: a collection, or any model around some, sharded or not.
    """
    state: dict[str, Any] = dict(model.state_dict())
    for prefix, collection in collections_in(model):
        give_back(collection.groups, collection.torchrec_kind, state, prefix)
    return state


def torchrec_optimizer_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a keyed optimizer (fused, or combined) in TorchRec's names and widths.

    Args:
        model: whose parameters it updates.
        state: of `torchrec.optim.keyed`; its tensors are handed on, copied where they are padded.
    """
    names = _row_names(model)
    renamed: dict[str, Any] = {}
    for key, entries in state["state"].items():
        start, own = _own_rows(key, names)
        if own is None:
            renamed[key] = entries
        else:
            name, columns, _ = names[own]
            renamed[start + name] = {n: narrowed(each, columns) for n, each in entries.items()}
    return {**state, "state": renamed}


def own_optimizer_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """What `torchrec_optimizer_state` made, as the optimizer's `load_state_dict` takes it.

    Args:
        model: whose parameters it updates.
        state: in TorchRec's names.
    """
    names = {name: (own, wide) for own, (name, _, wide) in _row_names(model).items()}
    renamed: dict[str, Any] = {}
    for key, entries in state["state"].items():
        start, theirs = _own_rows(key, names)
        if theirs is None:
            renamed[key] = entries
        else:
            own, columns = names[theirs]
            renamed[start + own] = {n: widened(each, columns) for n, each in entries.items()}
    return {**state, "state": renamed}


def collections_in(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, AssembledTables]]:
    """The collections in a model, and the prefixes of their entries in its state dict.

    Args:
        model: wrapped by TorchRec or torch, or not.
        prefix: of the model's own entries.
    """
    if isinstance(model, AssembledTables):
        yield prefix, model
        return
    for name, child in model.named_children():
        wraps = name in _WRAPPED or isinstance(model, DistributedDataParallel)
        yield from collections_in(child, prefix if wraps else f"{prefix}{name}.")


def _row_names(model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """Of whole tables by their own names in the model: TorchRec's, and true and padded widths."""
    found = {}
    for prefix, collection in collections_in(model):
        own = whole_tables(collection.groups)
        for group in collection.groups:
            for table in group.backend.physical_tables:
                if table.name in own:
                    name = prefix + torchrec_key(collection.torchrec_kind, table.name)
                    wide = table.config().embedding_dim
                    found[prefix + own[table.name]] = (name, table.embedding_dim, wide)
    return found


def _own_rows(key: str, names: Mapping[str, Any]) -> tuple[str, str | None]:
    """What a combined optimizer puts before a parameter's name, and that name if it is known."""
    for name in names:
        start = key[: len(key) - len(name)]
        if key.endswith(name) and (not start or start.endswith(".")):
            return start, name
    return "", None
