"""Embeddings of ids of one table, from whatever collection holds it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embcomp.collection.assembled import AssembledTables
from embcomp.collection.groups import table_features
from embcomp.errors import DataError
from embcomp.io.yaml_reading import did_you_mean, listed

_AT_ONCE = 1 << 22  # weights that a look-up returns, those of the other tables included


def embeddings_of(tables: AssembledTables, table: str, ids: Tensor) -> Tensor:
    """Look ids up in one table.

    Args:
        tables: any collection of ours, not sharded.
        table: the table's name.
        ids: int32 or int64 ids, of any shape.

    Returns:
        (*ids.shape, embedding_dim) embeddings, on the tables' device.

    Raises:
        DataError: there is no such table, ids are of another type, or there is none of that number.
    """
    known = {spec.name: spec for spec in tables.plan.tables}
    if table not in known:
        raise DataError(
            f"no table is called {table!r}{did_you_mean(table, known)}; there are {listed(known)}"
        )
    spec = known[table]
    if ids.dtype not in (torch.int32, torch.int64):
        raise DataError(f"table {table!r}: expected int32 or int64 ids, got {ids.dtype}")
    flat = ids.reshape(-1).to(tables.device, torch.int64)
    outside = (flat < 0) | (flat >= spec.num_embeddings)
    if bool(outside.any()):
        raise DataError(
            f"table {table!r} has ids in [0, {spec.num_embeddings}); got {int(flat[outside][0])}"
        )
    width = sum(t.embedding_dim * len(t.feature_names) for t in known.values())
    parts = [_looked_up(tables, table, part) for part in flat.split(max(1, _AT_ONCE // width))]
    found = torch.cat(parts) if parts else torch.empty(0, spec.embedding_dim)
    return found.reshape(*ids.shape, spec.embedding_dim)


def _looked_up(tables: AssembledTables, table: str, ids: Tensor) -> Tensor:
    """(N, embedding_dim) embeddings of (N,) ids, each a bag of its own."""
    instances = table_features(tables.plan.tables)
    owners = Counter(each.feature for each in instances)
    own = min(
        (each for each in instances if each.table.name == table),
        key=lambda each: owners[each.feature],
    )
    names = list(owners)
    lengths = [len(ids) if name == own.feature else 0 for name in names]
    one = torch.tensor([name == own.feature for name in names], dtype=torch.int32)
    batch = KeyedJaggedTensor(
        keys=names,
        values=ids,
        lengths=one.repeat_interleave(len(ids)).to(ids.device),
        weights=torch.ones(len(ids), device=ids.device) if tables.is_weighted_lookup else None,
        stride=len(ids),
        length_per_key=lengths,
    )
    found = tables(batch)
    if isinstance(found, KeyedTensor):
        return found[own.key]
    values: Tensor = found[own.key].values()
    return values
