"""What an artefact's tables hold, as numbers: rows, widths, norms, collisions, codes, neighbours.

Everything here follows from looking up every id once, through the artefact's own ``route`` and
``combine``, so that it works for any method. Ids whose look-ups are all skipped were pruned; where
pruned ids share a row instead, the method says which they are (``BackendConfig.pruned_ids``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.errors import DataError
from embcomp.groups import Group
from embcomp.row_types import row_bytes
from embcomp.serving import ServingEmbeddingBagCollection, ServingEmbeddingCollection
from embcomp.single_ids import SingleIds
from embcomp.tables import TableSpec

Tables = ServingEmbeddingBagCollection | ServingEmbeddingCollection

_CHUNK = 1 << 16  # ids that are looked up together
_DEAD = 1e-12


@dataclass(frozen=True, kw_only=True)
class CodebookFacts:
    """How a table's ids use the codewords that they are made of.

    Attributes:
        codewords: Codewords that the table's ids may name.
        used: Share of them that some id names.
        entropy: Bits of the distribution of codewords over ids, all look-ups together.
        traffic_entropy: The same over the train split's values; None without counts.
    """

    codewords: int
    used: float
    entropy: float
    traffic_entropy: float | None


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """What one logical table holds.

    Attributes:
        table: Its name.
        features: The features that are looked up in it.
        method: The method that holds it.
        ids: Its logical rows.
        rows: Physical rows that its ids reach; shared ones count once.
        row_type: How its physical rows are stored.
        width: Columns that are not zero for every id.
        mean_width: The same for single ids, averaged by traffic (over ids without counts).
        bytes: Its serving bytes; what several tables share is shared out to them.
        pruned: Ids without a row of their own because they were pruned.
        pruned_traffic: Share of the train split's values that are pruned; None without counts.
        dead: Ids whose embedding is zero.
        norm: Mean, smallest and largest L2 norm of an embedding that is not zero.
        collided: Ids that share all their rows with another id, and were not pruned.
        collided_traffic: Share of the train split's values that meet another, more frequent id in
            all their rows; None without counts.
        shared_rows: Share of this table's rows that ids of other tables reach as well.
        codebook: For methods with codes.
    """

    table: str
    features: tuple[str, ...]
    method: str
    ids: int
    rows: int
    row_type: str
    width: int
    mean_width: float
    bytes: int
    pruned: int
    pruned_traffic: float | None
    dead: int
    norm: tuple[float, float, float]
    collided: int
    collided_traffic: float | None
    shared_rows: float
    codebook: CodebookFacts | None


def inspect_tables(serving: Tables, counts: Mapping[str, Tensor]) -> list[TableFacts]:
    """Facts about every logical table.

    Args:
        serving: tables that were loaded with ``rows="torch"``.
        counts: for each table, (num_embeddings,) how often its ids occur in the train split;
            tables may be missing.
    """
    found: dict[str, TableFacts] = {}
    for index, group in enumerate(serving.groups):
        uses = _Uses.of(group)
        pruned = group.config.pruned_ids(group.tables, serving.form(index))
        sizes = _bytes_by_table(serving, group, uses)
        for table in group.tables:
            found[table.name] = _facts(
                serving,
                index,
                table,
                uses,
                pruned=pruned.get(table.name),
                traffic=counts.get(table.name),
                size=sizes[table.name],
            )
    return [found[table.name] for table in serving.plan.tables]


def embeddings(serving: Tables, table: TableSpec) -> Tensor:
    """(num_embeddings, embedding_dim) float32 embeddings of all ids of a table, on the CPU.

    Args:
        serving: tables that were loaded with ``rows="torch"``.
        table: one of them.
    """
    index = next(n for n, group in enumerate(serving.groups) if table in group.tables)
    instances = serving.groups[index].instances
    own = next(n for n, instance in enumerate(instances) if instance.table == table)
    start = sum(instance.table.embedding_dim for instance in instances[:own])
    single = SingleIds(serving)
    parts = []
    for first in range(0, table.num_embeddings, _CHUNK):
        last = min(first + _CHUNK, table.num_embeddings)
        ids = torch.zeros(len(instances), last - first, dtype=torch.int64, device=serving.device)
        ids[own] = torch.arange(first, last)
        parts.append(single(index, ids)[:, start : start + table.embedding_dim].cpu())
    return torch.cat(parts)


def rows_of_ids(group: Group, table: TableSpec) -> list[tuple[str, Tensor]]:
    """Where a method puts the ids of a table.

    Args:
        group: the method as built.
        table: one of its tables.

    Returns:
        For each physical look-up of an id, the physical table and (num_embeddings,) rows in it; a
        negative row where the look-up is skipped.
    """
    owners = {key: t.name for t in group.backend.physical_tables for key in t.keys}
    feature = table.feature_names[0]
    keys = [instance.key for instance in group.instances]
    own = next(
        n for n, i in enumerate(group.instances) if i.table is table and i.feature == feature
    )
    size = group.backend.ids_per_value
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, table.num_embeddings, _CHUNK):
        ids = torch.arange(start, min(start + _CHUNK, table.num_embeddings))
        batch = KeyedJaggedTensor(
            keys=keys,
            values=ids,
            lengths=torch.tensor([n == own for n in range(len(keys))])
            .int()
            .repeat_interleave(len(ids)),
            stride=len(ids),
            length_per_key=[len(ids) if n == own else 0 for n in range(len(keys))],
        )
        routed = group.backend.route(batch)
        counts, values = routed.length_per_key(), routed.values()
        for key, part in zip(routed.keys(), values.split(counts)):
            if len(part):
                parts.setdefault(key, []).append(part.view(len(ids), size))
    return [
        (owners[key], column)
        for key, pieces in parts.items()
        for column in torch.cat(pieces).to(torch.int64).unbind(dim=1)
    ]


@dataclass(frozen=True, kw_only=True)
class _Uses:
    """Where the ids of a method's tables lie.

    Attributes:
        placed: By table, the look-ups of an id: physical table and (num_embeddings,) rows.
        reached: By table and physical table, the rows that its ids reach, ascending.
        users: By physical table, (rows,) how many logical tables reach each row.
    """

    placed: Mapping[str, Sequence[tuple[str, Tensor]]]
    reached: Mapping[str, Mapping[str, Tensor]]
    users: Mapping[str, Tensor]

    @classmethod
    def of(cls, group: Group) -> _Uses:
        placed = {table.name: rows_of_ids(group, table) for table in group.tables}
        reached = {name: _distinct(parts) for name, parts in placed.items()}
        users = {
            t.name: torch.zeros(t.num_embeddings, dtype=torch.int64)
            for t in group.backend.physical_tables
        }
        for by_table in reached.values():
            for name, rows in by_table.items():
                users[name][rows] += 1
        return cls(placed=placed, reached=reached, users=users)


def _distinct(parts: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The rows that are reached in each physical table, once each."""
    joined: dict[str, list[Tensor]] = {}
    for name, rows in parts:
        joined.setdefault(name, []).append(rows[rows >= 0])
    return {name: torch.unique(torch.cat(rows)) for name, rows in joined.items()}


def _bytes_by_table(serving: Tables, group: Group, uses: _Uses) -> dict[str, float]:
    """A method's serving bytes, shared out to its tables.

    Rows belong to those that reach them, in equal parts; rows that nobody reaches to those that
    look up in their table. Codes, masks and the like belong to the table that they are named after.
    """
    sizes = dict.fromkeys(uses.placed, 0.0)
    for table in group.backend.physical_tables:
        size = row_bytes(table.embedding_dim, serving.record.row_types[table.name])
        users = uses.users[table.name]
        look_up = [name for name in sizes if table.name in uses.reached[name]]
        for name in look_up:
            rows = uses.reached[name][table.name]
            sizes[name] += size * float((1 / users[rows].double()).sum())
            sizes[name] += size * int((users == 0).sum()) / len(look_up)
    for tensor in group.config.footprint(group.tables).tensors:
        if not tensor.look_up:
            own = [name for name in sizes if tensor.name.partition(".")[0] == name] or list(sizes)
            for name in own:
                sizes[name] += tensor.serve_bytes / len(own)
    return sizes


def _facts(
    serving: Tables,
    index: int,
    table: TableSpec,
    uses: _Uses,
    *,
    pruned: Tensor | None,
    traffic: Tensor | None,
    size: float,
) -> TableFacts:
    group, placed, reached = (
        serving.groups[index],
        uses.placed[table.name],
        uses.reached[table.name],
    )
    rows = embeddings(serving, table)
    is_set = rows != 0
    norms = rows.norm(dim=1)
    alive = norms > _DEAD
    skipped = torch.ones(len(rows), dtype=torch.bool)
    for _, places in placed:
        skipped &= places < 0
    pruned = skipped if pruned is None else skipped | pruned.cpu()
    together = _together(placed, len(rows))
    others = torch.bincount(together)[together] > 1
    count = sum(len(part) for part in reached.values())
    shared = sum(int((uses.users[name][part] > 1).sum()) for name, part in reached.items())
    return TableFacts(
        table=table.name,
        features=table.feature_names,
        method=group.config.name,
        ids=table.num_embeddings,
        rows=count,
        row_type="/".join(sorted({serving.record.row_types[name] for name in reached})),
        width=int(is_set.any(dim=0).sum()),
        mean_width=_weighted(is_set.sum(dim=1).double(), traffic),
        bytes=round(size),
        pruned=int(pruned.sum()),
        pruned_traffic=_share(pruned, traffic),
        dead=int((~alive).sum()),
        norm=_spread(norms[alive]),
        collided=int((others & ~pruned).sum()),
        collided_traffic=_share(_follows(together, traffic) & ~pruned, traffic),
        shared_rows=shared / count if count else 0.0,
        codebook=_codebook(group, placed, traffic),
    )


def _together(placed: Sequence[tuple[str, Tensor]], ids: int) -> Tensor:
    """(ids,) a number for each set of rows: equal where two ids have all their rows in common."""
    found = torch.zeros(ids, dtype=torch.int64)
    for _, rows in placed:
        pairs = found * (int(rows.max()) + 2) + rows + 1  # a skipped look-up is -1
        found = torch.unique(pairs, return_inverse=True)[1]
    return found


def _follows(together: Tensor, traffic: Tensor | None) -> Tensor:
    """(ids,) whether a more frequent id has all rows in common; of equals, the lower one leads."""
    ids = len(together)
    weight = torch.zeros(ids, dtype=torch.int64) if traffic is None else traffic.to(torch.int64)
    order = torch.argsort(weight, descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(ids)
    first = torch.full((int(together.max()) + 1,), ids)
    first = first.scatter_reduce(0, together, place, "amin")
    return place > first[together]


def _codebook(
    group: Group, placed: Sequence[tuple[str, Tensor]], traffic: Tensor | None
) -> CodebookFacts | None:
    books = {t.name: t.num_embeddings for t in group.backend.physical_tables if t.is_codebook}
    columns = [(name, rows) for name, rows in placed if name in books]
    if not columns:
        return None
    name = columns[0][0]
    rows = torch.stack([part for _, part in columns])  # (look-ups, ids)
    uses = torch.bincount(rows.reshape(-1), minlength=books[name])
    weighted = None
    if traffic is not None:
        repeated = traffic.double().expand(len(rows), -1).reshape(-1)
        weighted = torch.bincount(rows.reshape(-1), weights=repeated, minlength=books[name])
    return CodebookFacts(
        codewords=books[name],
        used=float((uses > 0).double().mean()),
        entropy=_entropy(uses.double()),
        traffic_entropy=None if weighted is None else _entropy(weighted),
    )


def _entropy(weights: Tensor) -> float:
    total = float(weights.sum())
    if not total:
        return 0.0
    shares = weights[weights > 0] / total
    return float(-(shares * shares.log2()).sum())


def _spread(norms: Tensor) -> tuple[float, float, float]:
    if not len(norms):
        return (0.0, 0.0, 0.0)
    return float(norms.mean()), float(norms.min()), float(norms.max())


def _weighted(values: Tensor, traffic: Tensor | None) -> float:
    if traffic is None or not float(traffic.sum()):
        return float(values.mean())
    return float((values * traffic).sum() / traffic.sum())


def _share(mask: Tensor, traffic: Tensor | None) -> float | None:
    if traffic is None:
        return None
    total = float(traffic.sum())
    return float(traffic[mask].sum()) / total if total else 0.0


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """An id whose embedding points in nearly the same direction.

    Attributes:
        id: It.
        cosine: Of the angle between both embeddings.
        distance: Between both embeddings.
    """

    id: int
    cosine: float
    distance: float


def nearest(serving: Tables, table: TableSpec, id_: int, count: int) -> list[Neighbour]:
    """The ids with the nearest embeddings by cosine; of equals, the lower id comes first.

    Args:
        serving: loaded tables.
        table: one of its tables.
        id_: an id of it.
        count: how many.

    Raises:
        DataError: the id is not in the table, or its embedding is zero.
    """
    if not 0 <= id_ < table.num_embeddings:
        raise DataError(f"table {table.name!r} has ids in [0, {table.num_embeddings}); got {id_}")
    rows = embeddings(serving, table).double()
    own = rows[id_]
    if not float(own.norm()) > _DEAD:
        raise DataError(f"the embedding of id {id_} of table {table.name!r} is zero: no direction")
    norms = rows.norm(dim=1)
    cosines = torch.where(
        norms > _DEAD, rows @ own / (norms * own.norm()).clamp(min=_DEAD), -math.inf
    )
    cosines[id_] = -math.inf
    order = torch.argsort(cosines, descending=True, stable=True)[:count]
    return [
        Neighbour(id=int(i), cosine=float(cosines[i]), distance=float((rows[i] - own).norm()))
        for i in order
        if math.isfinite(float(cosines[i]))
    ]
