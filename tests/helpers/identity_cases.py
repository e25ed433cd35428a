"""One set of tables in four other orders and companies, and methods whose settings go along."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch

from embcomp.backends import Blocks, Sparse
from embcomp.backends.base import BackendConfig
from embcomp.backends.blocks import SpreadColumns
from embcomp.backends.codebooks.bit_packing import pack_bits
from embcomp.backends.codebooks.coded import CodedRoute
from embcomp.backends.codebooks.codewords import Codewords
from embcomp.backends.sparse import SparseRoute
from embcomp.backends.widths.threshold_gate import NormMeans
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.layers.pruned_route import PrunedRoute, pack
from embcomp.testing.check_data import Declared
from tests.helpers.backends_under_test import CASES

TABLES = {
    "t0": Declared(name="t0", rows=60, dim=10, features=("f0", "f1")),
    "t1": Declared(name="t1", rows=60, dim=10, features=("f2",)),
    "t2": Declared(name="t2", rows=60, dim=10, features=("f3",)),
    "a": Declared(name="a", rows=60, dim=10, features=("fa",)),  # before all others by name
    "z": Declared(name="z", rows=60, dim=10, features=("fz",)),
}
TRAINED = ("t0", "t1", "t2")
CHANGES = {
    "reordered": ("t2", "t0", "t1"),
    "inserted": ("t0", "a", "t1", "t2"),
    "appended": ("t0", "t1", "t2", "z"),
    "removed": ("t1", "t2"),
    "another in its place": ("t0", "a", "t2"),
}


def settings_for(config: BackendConfig, names: Sequence[str]) -> BackendConfig:
    """A method with its settings of single tables for these tables, as a user would give them."""
    changed: dict[str, object] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Mapping) and set(value) & set(TABLES):
            whole = isinstance(config, Blocks | Sparse) and field.name != "budget"
            given = dict.fromkeys(names, value["t0"]) if whole else {}
            changed[field.name] = {**given, **{k: v for k, v in value.items() if k in names}}
        elif field.name == "sharing_groups":
            kept = (tuple(name for name in group if name in names) for group in value)
            changed[field.name] = tuple(group for group in kept if group)
    return dataclasses.replace(config, **changed)  # type: ignore[arg-type]


def collection_of(
    case: str, names: Sequence[str], seed: int, method: BackendConfig | None = None
) -> CompressedEmbeddingBagCollection:
    """A case's collection of these tables, its rows drawn with a seed."""
    config = settings_for(method or CASES[case].config, names)
    torch.manual_seed(seed)
    tables = [TABLES[name].bag() for name in names]
    return CompressedEmbeddingBagCollection(tables, config).eval()


@torch.no_grad()
def learn(collection: CompressedEmbeddingBagCollection, seed: int = 0) -> None:
    """Give everything that is learnt values that no config implies."""
    random = torch.Generator().manual_seed(seed)
    collection.state_dict()  # fills
    for parameter in collection.parameters():
        parameter.add_(torch.rand(parameter.shape, generator=random), alpha=0.1)
    for module in collection.modules():
        if isinstance(module, CodedRoute):
            for table, part in zip(module._layout.tables, module.held_parts("codes")):
                size = table.num_embeddings * module._layout.positions(table)
                packed = pack_bits(
                    torch.randint(module._count, (size,), generator=random), module._bits
                )
                module.codes[part.place] = 0
                module.codes[part.start : part.start + len(packed)] = packed
        elif isinstance(module, PrunedRoute):
            masks = [torch.randperm(n, generator=random) < kept for n, kept in module._sizes]
            for buffer, parts in zip((module.words, module.counts), zip(*map(pack, masks))):
                buffer.copy_(torch.cat(parts))
        elif isinstance(module, SpreadColumns):
            module.columns.copy_(torch.randint(10, module.columns.shape, generator=random))
        elif isinstance(module, SparseRoute):
            _other_columns(module, random)
        elif isinstance(module, NormMeans):
            module.means.copy_(torch.rand(module.means.shape, generator=random))
        elif isinstance(module, Codewords):
            module.words.copy_(torch.rand(module.words.shape, generator=random))


def _other_columns(module: SparseRoute, random: torch.Generator) -> None:
    """Each row's elements in other columns, no two in one."""
    pointers = module.pointers.split([table.rows + 1 for table in module._tables])
    columns = module.columns.split([table.elements for table in module._tables])
    for ends, own, table in zip(pointers, columns, module._tables):
        for low, high in zip(ends[:-1].tolist(), ends[1:].tolist()):
            drawn = torch.randperm(table.columns, generator=random)[: high - low]
            own[low:high] = drawn.to(own.dtype)


def shared(names: Iterable[str]) -> list[str]:
    """Those of the trained tables that are among them."""
    return [name for name in TRAINED if name in names]
