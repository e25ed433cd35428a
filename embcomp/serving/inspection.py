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
from embcomp.io.mapped_arrays import temporary_mask
from embcomp.layers.row_sources import RowSource, as_rows
from embcomp.serving.id_collisions import Collisions, IdKeys
from embcomp.serving.id_statistics import IdStatistics
from embcomp.serving.neighbours import Tables
from embcomp.serving.row_sharing import RowSharing, count_true, placed_blocks
from embcomp.tables.specs import TableSpec

_AT_ONCE = 1 << 20  # ids whose traffic is added up together


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
    pruned: Tensor | RowSource | None,
    traffic: Tensor | None,
    size: float,
) -> TableFacts:
    group, reached = serving.groups[index], uses.reached[table.name]
    ids = IdStatistics.of(serving, table, traffic)
    rows = uses.rows(table.name)
    lookups = _Lookups.of(group, table, distinct_rows=rows, traffic=traffic)
    gone = lookups.skipped
    if pruned is not None:
        _add_to(gone, as_rows(pruned))
    collided = Collisions()
    if lookups.keys is not None:
        collided = Collisions.of(lookups.keys, gone, traffic)
    total = 0.0 if traffic is None else float(traffic.sum())
    return TableFacts(
        table=table.name,
        features=table.feature_names,
        method=group.config.name,
        ids=table.num_embeddings,
        rows=rows,
        row_type="/".join(sorted({serving.record.row_types[name] for name in reached})),
        width=ids.width,
        mean_width=ids.mean_width,
        bytes=round(size),
        pruned=count_true(gone),
        pruned_traffic=None if traffic is None else _share(_traffic_of(gone, traffic), total),
        dead=ids.dead,
        norm=ids.norm,
        collided=collided.ids,
        collided_traffic=None if traffic is None else _share(collided.traffic, total),
        shared_rows=uses.shared_rows(table.name) / rows if rows else 0.0,
        codebook=_codebook(group, table, lookups),
    )


def _add_to(gone: Tensor, more: RowSource) -> None:
    for start in range(0, len(gone), _AT_ONCE):
        part = gone[start : start + _AT_ONCE]
        part |= more.read(start, start + len(part)).cpu()


@dataclass(kw_only=True)
class _Lookups:
    """What the look-ups of a table's ids add up to.

    Attributes:
        skipped: (ids,) bool, the ids none of whose look-ups is made; in a temporary file.
        keys: tells ids apart by their rows; None where each has a row of its own.
        uses: (rows,) how many look-ups go to each row of the codebook; None for other tables.
        weighted: the same by traffic; None without counts.
    """

    skipped: Tensor
    keys: IdKeys | None
    uses: Tensor | None
    weighted: Tensor | None

    @classmethod
    def of(
        cls, group: Group, table: TableSpec, *, distinct_rows: int, traffic: Tensor | None
    ) -> _Lookups:
        ids, physical = table.num_embeddings, group.backend.physical_tables
        skipped = torch.from_numpy(temporary_mask(ids, "which ids of a table are pruned"))
        found = cls(skipped=skipped.fill_(True), keys=None, uses=None, weighted=None)
        if _has_codebook(group, table):
            rows_of_words = max(each.num_embeddings for each in physical)
            found.uses = torch.zeros(rows_of_words, dtype=torch.int64)
            found.weighted = None if traffic is None else found.uses.double()
        for start, placed in placed_blocks(group, table):
            rows = [each for _, each in placed]
            if start == 0 and not (len(rows) == 1 and distinct_rows == ids):
                found.keys = IdKeys(ids)
            own = slice(start, start + len(rows[0]) if rows else start)
            found._add(own, rows, None if traffic is None else traffic[own])
        return found

    def _add(self, own: slice, rows: Sequence[Tensor], traffic: Tensor | None) -> None:
        for each in rows:
            self.skipped[own] &= each < 0
        if self.keys is not None and rows:
            self.keys.put(own.start, rows)
        if self.uses is None:
            return
        for each in rows:
            self.uses += each.bincount(minlength=len(self.uses))
            if self.weighted is not None and traffic is not None:
                self.weighted += each.bincount(traffic.double(), len(self.weighted))


def _has_codebook(group: Group, table: TableSpec) -> bool:
    physical = group.backend.physical_tables
    within = group.config.codeword_count(table, group.tables)
    return within is not None and all(each.is_codebook for each in physical)


def _codebook(group: Group, table: TableSpec, lookups: _Lookups) -> CodebookFacts | None:
    within = group.config.codeword_count(table, group.tables)
    if within is None or lookups.uses is None:
        return None
    weighted = lookups.weighted
    return CodebookFacts(
        codewords=within,
        used=int((lookups.uses > 0).sum()) / within,
        entropy=_entropy(lookups.uses.double()),
        traffic_entropy=None if weighted is None else _entropy(weighted),
    )


def _entropy(weights: Tensor) -> float:
    total = float(weights.sum())
    if not total:
        return 0.0
    shares = weights[weights > 0] / total
    return float(-(shares * shares.log2()).sum())


def _traffic_of(mask: Tensor, traffic: Tensor) -> float:
    """What the ids of a mask count."""
    parts = zip(mask.split(_AT_ONCE), traffic.split(_AT_ONCE))
    return sum(float(own[chosen].sum()) for chosen, own in parts)


def _share(part: float, total: float) -> float:
    return part / total if total else 0.0
