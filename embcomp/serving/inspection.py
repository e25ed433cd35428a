"""What an artefact's tables hold, as numbers: rows, widths, norms, collisions, codes.

Everything here follows from looking up every id once, through the artefact's own `route` and
`combine`, so that it works for any method. Ids whose look-ups are all skipped were pruned; where
pruned ids share a row instead, the method says which they are (`BackendConfig.pruned_ids`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embcomp.collection.groups import Group
from embcomp.serving.id_statistics import IdStatistics
from embcomp.serving.neighbours import Tables
from embcomp.serving.row_sharing import RowSharing
from embcomp.tables.specs import TableSpec


@dataclass(frozen=True, kw_only=True)
class CodebookFacts:
    """How a table's ids use the codewords that they are made of.

    Attributes:
        codewords: codewords that the table's ids may name.
        used: share of them that some id names.
        entropy: bits of the distribution of codewords over ids, all look-ups together.
        traffic_entropy: the same over the train split's values; None without counts.
    """

    codewords: int
    used: float
    entropy: float
    traffic_entropy: float | None


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """What one logical table holds.

    Attributes:
        table: its name.
        features: the features that are looked up in it.
        method: the method that holds it.
        ids: its logical rows.
        rows: physical rows that its ids reach; shared ones count once.
        row_type: how its physical rows are stored.
        width: columns that are not zero for every id.
        mean_width: the same for single ids, averaged by traffic (over ids without counts).
        bytes: its serving bytes; what several tables share is shared out to them.
        pruned: ids without a row of their own because they were pruned.
        pruned_traffic: share of the train split's values that are pruned; None without counts.
        dead: ids whose embedding is zero.
        norm: mean, smallest and largest L2 norm of an embedding that is not zero.
        collided: ids that share all their rows with another id, and were not pruned.
        collided_traffic: share of the train split's values that meet another, more frequent id in
            all their rows; None without counts.
        shared_rows: share of this table's rows that ids of other tables reach as well.
        codebook: for methods with codes.
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
        serving: tables that were loaded with `rows="torch"`.
        counts: for each table, (num_embeddings,) how often its ids occur in the train split;
            tables may be missing.
    """
    found: dict[str, TableFacts] = {}
    for index, group in enumerate(serving.groups):
        uses = RowSharing.of(group)
        pruned = group.config.pruned_ids(group.tables, serving.form(index))
        sizes = uses.bytes_by_table(group, serving.record.row_types)
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


def _facts(
    serving: Tables,
    index: int,
    table: TableSpec,
    uses: RowSharing,
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
    ids = IdStatistics.of(serving, table)
    skipped = torch.ones(table.num_embeddings, dtype=torch.bool)
    for _, places in placed:
        skipped &= places < 0
    pruned = skipped if pruned is None else skipped | pruned.cpu()
    together = _together(placed, table.num_embeddings)
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
        width=ids.width,
        mean_width=_weighted(ids.columns.double(), traffic),
        bytes=round(size),
        pruned=int(pruned.sum()),
        pruned_traffic=_share(pruned, traffic),
        dead=int((~ids.alive).sum()),
        norm=_spread(ids.norms[ids.alive]),
        collided=int((others & ~pruned).sum()),
        collided_traffic=_share(_follows(together, traffic) & ~pruned, traffic),
        shared_rows=shared / count if count else 0.0,
        codebook=_codebook(group, table, placed, traffic),
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
    group: Group,
    table: TableSpec,
    placed: Sequence[tuple[str, Tensor]],
    traffic: Tensor | None,
) -> CodebookFacts | None:
    within = group.config.codeword_count(table, group.tables)
    is_codebook = [physical.is_codebook for physical in group.backend.physical_tables]
    if within is None or not all(is_codebook):
        return None
    rows = torch.stack([part for _, part in placed])  # (look-ups, ids)
    uses = torch.bincount(rows.reshape(-1))
    weighted = None
    if traffic is not None:
        repeated = traffic.double().expand(len(rows), -1).reshape(-1)
        weighted = torch.bincount(rows.reshape(-1), weights=repeated)
    return CodebookFacts(
        codewords=within,
        used=int((uses > 0).sum()) / within,
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
