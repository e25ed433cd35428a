"""From rows to codebooks and codes: weights of ids, k-means over all who share, the nearest codeword.

Rows are read by block, so that tables may be larger than what a process holds: sums are added up block
by block, k-means runs on a bounded sample, and the codes of a block depend on its rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embcomp.backends.codebooks.kmeans import POINTS_PER_CENTROID, Clustering, kmeans
from embcomp.backends.codebooks.nearest import nearest
from embcomp.backends.codebooks.row_samples import sample_rows
from embcomp.backends.codebooks.subvectors import SubvectorLayout
from embcomp.layers.block_work import IN_MEMORY, RowBlock, Work, add_up, row_blocks
from embcomp.layers.hashing import salt
from embcomp.layers.id_counts import counts_of_range, was_counted
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.name_hash import name64
from embcomp.tables.specs import TableSpec

FREQUENCY_EXPONENT = 0.5
"""Ids count in clusterings by this power of their frequency: rare rows are mostly noise."""

_MOST_POINTS = 1 << 20  # of a sample, where that is enough for its centroids
_FEWEST_PER_CENTROID = 32


def id_weights(tables: Sequence[TableSpec], counts: Mapping[str, Tensor]) -> dict[str, RowSource]:
    """What each id counts: (num_embeddings,) float64 for each table.

    Where nobody counted, all ids count alike.
    """

    def weights(table: TableSpec) -> RowSource:
        known = was_counted(table, counts)

        def of_range(start: int, stop: int) -> Tensor:
            if not known:
                return torch.ones(stop - start, dtype=torch.float64)
            return counts_of_range(table, counts, start, stop) ** FREQUENCY_EXPONENT

        return ComputedRows((table.num_embeddings,), torch.float64, of_range)

    return {table.name: weights(table) for table in tables}


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What is clustered of a group of tables.

    Args:
        layout: the group's sub-vectors.
        rows: for each table, (N, positions, w).
        weights: for each table, (N,) float64 what its rows count.
        work: does what is to be done for every block.
    """

    layout: SubvectorLayout
    rows: Mapping[str, RowSource]
    weights: Mapping[str, RowSource]
    work: Work = IN_MEMORY

    @property
    def tables(self) -> Sequence[TableSpec]:
        """The group."""
        return self.layout.tables

    def blocks(self, table: TableSpec) -> list[RowBlock]:
        """The blocks of a table."""
        return row_blocks(table.name, table.num_embeddings, table.embedding_dim)

    def with_rows(self, rows: Mapping[str, RowSource]) -> Latents:
        """Other rows of the same tables."""
        return replace(self, rows=rows)

    def in_single_precision(self) -> Latents:
        """The same in float32."""

        def rounded(rows: RowSource) -> RowSource:
            return ComputedRows(
                rows.shape, torch.float32, lambda a, b: rows.read(a, b).float(), of=[rows]
            )

        return self.with_rows({name: rounded(rows) for name, rows in self.rows.items()})


def cut_rows(layout: SubvectorLayout, rows: RowSource) -> RowSource:
    """(N, embedding_dim) rows as (N, positions, width) float32 sub-vectors, padded by zeros."""
    positions = -(-rows.shape[1] // layout.width)
    return ComputedRows(
        (len(rows), positions, layout.width),
        torch.float32,
        lambda a, b: layout.cut(rows.read(a, b)),
        of=[rows],
    )


def share_cold_rows(latents: Latents) -> Latents:
    """Rows whose ids never occur, made the weighted mean of the others, so that they share codes."""
    shared = {}
    for table in latents.tables:
        rows, weights = latents.rows[table.name], latents.weights[table.name]
        mean = _mean_of_others(table, latents)
        shared[table.name] = rows if mean is None else _with_mean(rows, weights, mean)
    return latents.with_rows(shared)


def _mean_of_others(table: TableSpec, latents: Latents) -> Tensor | None:
    """The weighted mean of a table's rows; None where none of its ids, or all, never occur."""
    rows, weights = latents.rows[table.name], latents.weights[table.name]

    def masses(block: RowBlock) -> dict[str, Tensor]:
        own = weights.read(block.start, block.stop)
        return {"whole": own.sum(), "cold": (own == 0).sum()}

    blocks = latents.blocks(table)
    mass = add_up(latents.work, f"cold-{table.name}", masses, blocks)
    if not 0 < int(mass["cold"]) < len(rows):
        return None

    def sums(block: RowBlock) -> dict[str, Tensor]:
        share = weights.read(block.start, block.stop) / mass["whole"]
        own = rows.read(block.start, block.stop).double()
        return {"mean": torch.tensordot(share, own, dims=1)}

    return add_up(latents.work, f"mean-{table.name}", sums, blocks)["mean"].to(rows.dtype)


def _with_mean(rows: RowSource, weights: RowSource, mean: Tensor) -> RowSource:
    def replaced(start: int, stop: int) -> Tensor:
        own = rows.read(start, stop).clone()
        own[weights.read(start, stop) == 0] = mean
        return own

    return ComputedRows(rows.shape, rows.dtype, replaced, of=[rows])


@dataclass(frozen=True, kw_only=True)
class Codebooks:
    """Codewords, and the tables' factors on them.

    Args:
        words: (G, k, w) float32.
        scales: one for each table; 1 where tables have none of their own.
    """

    words: Tensor
    scales: tuple[float, ...]


def find_scales(latents: Latents, *, scaled: bool) -> tuple[float, ...]:
    """Each table's root mean square over that of all, by weight; ones where not `scaled`.

    Args:
        latents: what is clustered.
        scaled: whether tables have factors of their own.
    """
    ones = (1.0,) * len(latents.tables)
    if not scaled or len(ones) == 1:
        return ones

    def measure(block: RowBlock) -> dict[str, Tensor]:
        mass = latents.weights[block.table].read(block.start, block.stop)
        own = latents.rows[block.table].read(block.start, block.stop)
        return {"mass": mass.sum(), "square": (mass * own.double().square().mean((1, 2))).sum()}

    squares, masses = [], []
    for table in latents.tables:
        name = f"scales-{table.name}"
        found = add_up(latents.work, name, measure, latents.blocks(table))
        squares.append(float(found["square"]))
        masses.append(float(found["mass"]))
    whole = sum(squares) / max(sum(masses), 1e-300)
    if not whole > 0:
        return ones
    return tuple(
        (square / mass / whole) ** 0.5 if square > 0 and mass > 0 else 1.0
        for square, mass in zip(squares, masses)
    )


def cluster(
    latents: Latents,
    *,
    count: int,
    seed: int,
    scaled: bool,
    backend: Clustering = "torch",
    iterations: int = 25,
) -> Codebooks:
    """One codebook for all sub-vectors that share it.

    Args:
        latents: what is clustered.
        count: codewords in a codebook.
        seed: of the samples and the clusterings.
        scaled: whether tables have factors of their own.
        backend: what runs k-means.
        iterations: at most so many in each.
    """
    scales = find_scales(latents, scaled=scaled)
    words = find_codewords(
        latents, scales, count=count, seed=seed, backend=backend, iterations=iterations
    )
    return Codebooks(words=words.whole().unflatten(0, (-1, count)), scales=scales)


def find_codewords(
    latents: Latents,
    scales: tuple[float, ...],
    *,
    count: int,
    seed: int,
    backend: Clustering = "torch",
    iterations: int = 25,
) -> RowSource:
    """(G * count, w) float32, the codewords of `cluster` by range, those of a codebook together.

    Args:
        latents: what is clustered.
        scales: what each table's rows are divided by.
        count: codewords in a codebook.
        seed: of the samples and the clusterings.
        backend: what runs k-means.
        iterations: at most so many in each.
    """
    layout = latents.layout
    samples = Samples.of(latents, scales, points=sample_size(count), seed=seed)
    named = [(name64(unit), place) for unit, own in layout.units for place in range(own)]

    def fit(shared: int) -> Tensor:
        unit, place = named[shared]
        own = salt(seed, unit, place) >> 1
        points, masses = samples.members(shared)
        found = kmeans(points, masses, count, seed=own, backend=backend, iterations=iterations)
        return found.centroids

    books, width = range(len(named)), next(iter(latents.rows.values())).shape[2]
    shape = (len(books) * count, width)
    sizes = [count] * len(books)
    return latents.work.write("codewords", fit, books, shape, torch.float32, sizes=sizes)


def sample_size(count: int, points_per_centroid: int = POINTS_PER_CENTROID) -> int:
    """Rows that k-means looks at, at the most.

    Args:
        count: centroids.
        points_per_centroid: as many as there are room for.
    """
    most = max(_MOST_POINTS, _FEWEST_PER_CENTROID * count)
    return min(points_per_centroid * count, most)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Rows on which codebooks are fitted.

    Args:
        layout: the group's sub-vectors.
        scales: what each table's rows are divided by.
        rows: by the tables that share a codebook, and by table, (n, positions, w).
        weights: the same of what they count, (n,).
    """

    layout: SubvectorLayout
    scales: Sequence[float]
    rows: Mapping[tuple[str, ...], Mapping[str, RowSource]]
    weights: Mapping[tuple[str, ...], Mapping[str, Tensor]]

    @classmethod
    def of(cls, latents: Latents, scales: Sequence[float], *, points: int, seed: int) -> Samples:
        """Draw a sample for all tables that share a codebook.

        Args:
            latents: what is clustered.
            scales: what each table's rows are divided by.
            points: rows of a sample at the most.
            seed: of what is drawn.
        """
        layout, work = latents.layout, latents.work
        rows: dict[tuple[str, ...], dict[str, RowSource]] = {}
        weights: dict[tuple[str, ...], Mapping[str, Tensor]] = {}
        for shared in range(layout.num_shared):
            tables = _sharing(layout, shared)
            if tables in rows:
                continue
            name = f"sample-{shared}"
            own = {table: latents.weights[table] for table in tables}
            widest = max(table.embedding_dim for table in layout.tables)
            drawn = sample_rows(name, own, widest, points, seed, work)
            weights[tables] = drawn.weights
            rows[tables] = {
                table: drawn.gather(f"{name}-{table}", latents.rows[table], table, work)
                for table in tables
            }
        return cls(layout=layout, scales=scales, rows=rows, weights=weights)

    def members(self, shared: int) -> tuple[Tensor, Tensor]:
        """The sample of one codebook (n, w), without the tables' scales, and its weights (n,)."""
        tables = _sharing(self.layout, shared)
        points, masses = [], []
        for n, table in enumerate(self.layout.tables):
            for position, owner in enumerate(self.layout.shared_by(n)):
                if owner == shared:
                    rows = _at_position(self.rows[tables][table.name], position).whole()
                    points.append(rows / self.scales[n])
                    masses.append(self.weights[tables][table.name])
        return torch.cat(points), torch.cat(masses)


def _at_position(rows: RowSource, position: int) -> RowSource:
    """(N, w) one sub-vector of each row."""
    shape = (len(rows), rows.shape[2])
    return ComputedRows(shape, rows.dtype, lambda a, b: rows.read(a, b)[:, position], of=[rows])


def _sharing(layout: SubvectorLayout, shared: int) -> tuple[str, ...]:
    """The tables that have a codebook."""
    return tuple(
        table.name for n, table in enumerate(layout.tables) if shared in layout.shared_by(n)
    )


def encode(layout: SubvectorLayout, table: int, latents: Tensor, codebooks: Codebooks) -> Tensor:
    """The codes of a block of rows: (n, positions) int64.

    Args:
        layout: the group's sub-vectors.
        table: place of the rows' table in the group.
        latents: (n, positions, w).
        codebooks: of the group.
    """
    which, scale = torch.tensor(layout.shared_by(table)), codebooks.scales[table]
    return nearest(latents if scale == 1 else latents / scale, codebooks.words, which)
