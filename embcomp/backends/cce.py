"""CCE: each part of an embedding is the sum of a row that clustering chose for the id and one by hash.

Tsang, Ahle, "Clustering the Sketch: Dynamic Compression for Embedding Tables", NeurIPS 2023,
https://arxiv.org/abs/2210.05974. An embedding is cut into parts; a part is `T[h(id)] + T'[h'(id)]`, where `h`
is at first a hash like `h'`. After each pass parts of all ids are clustered: centroids become the rows of `T`, `h` the
nearest of them, and `T'` is dealt out by a new hash, each of its rows the mean of what centroids leave of its
ids. So ids that turned out alike come to share a row, where `hash` has them share whatever they are. Passes
and clusterings alternate here as stages.

Where we depart from the paper (its code has no licence, and none of it is used):

- the map `h` is billed: packed to the bits that its rows need (`c log2 R` an id), where the paper counts trained
  weights only. It is the floor of a budget: with four parts and 8 bits, 6.25 % of 16 fp32 columns;
- rows count in clusterings and means by the root of their frequency, where it is known; ids that never occur share
  the codes of the mean; a row of `T'` to which nothing falls is zero;
- `h'` is drawn once for a clustering, before anything is read (a known fault of the published code draws it anew
  for each block of ids, so that what is left is added up by one hash and read by another);
- optimizers begin each stage anew, for rows and network, as everywhere between stages.

The map lies whole on every rank, like that of `mapped`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.backends.base import Backend, MethodState, StageInputs
from embcomp.backends.codebooks.clustering import (
    Codebooks,
    Latents,
    cluster,
    encode,
    id_weights,
    share_cold_rows,
)
from embcomp.backends.codebooks.kmeans import Clustering
from embcomp.backends.codebooks.subvectors import SubvectorLayout
from embcomp.backends.full import RangeCheck
from embcomp.backends.hashed_rows import SizedByRows
from embcomp.backends.mapped.mapped_route import (
    HashedLines,
    MappedRoute,
    MappedTable,
    widened,
)
from embcomp.backends.mapped.row_codes import gather_codes, packed, stream_bytes
from embcomp.backends.stages import Stage
from embcomp.backends.unified import FitWidths
from embcomp.io.constraints import Ge, Le
from embcomp.layers.block_work import NamedWork, RowBlock, Work, add_up
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.routing import beside_ids
from embcomp.layers.row_sources import ComputedRows, RowSource, as_rows
from embcomp.tables.footprint import Footprint, TensorFootprint
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit, by_name

_ROUNDS = 1 << 16  # parts of a round have salts of their own below this


@dataclass(frozen=True, kw_only=True)
class CCE(SizedByRows):
    """Parts that are sums of a clustered and a hashed row. Ids must lie in `[0, num_embeddings)`.

    Args:
        num_buckets: rows of each of the two tables of a part (`R`).
        ratio: the same as a share of `num_embeddings`, rounded down, at least 1.
        subvector_dim: columns of a part.
        clusterings: how often parts are clustered, each time after a pass over the training rows.
        clustering: what runs k-means.
        round: how often that was; stages count it up.
        collisionless: tables of at most this many rows stay full.
        seed: salts the hashes, and draws k-means' samples.
    """

    subvector_dim: Annotated[int, Ge(1), Le(2**16)] = 4
    clusterings: Annotated[int, Ge(0), Le(100)] = 2
    clustering: Clustering = "torch"
    round: Annotated[int, Ge(0)] = 0
    seed: int = 2021

    name: ClassVar[str] = "cce"

    def parts(self, table: TableSpec) -> int:
        """Parts of an embedding."""
        return ceil(table.embedding_dim / self.subvector_dim)

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        weights = 2 * self.rows(table) * self.parts(table) * self.subvector_dim
        stored = weights * table.itemsize + self._mapped(table).stored_bytes
        return super().keeps_full(table) or stored >= table.full_bytes

    def _mapped(self, table: TableSpec) -> MappedTable:
        """The map `h` of a table; of each part's rows those of `T` are the first."""
        rows, parts = self.rows(table), self.parts(table)
        salts = [table_salt(self.seed, table.name, _salt(0, part, 0)) for part in range(parts)]

        return MappedTable(
            name=table.name,
            num_ids=table.num_embeddings,
            rows=(rows,) * parts,
            firsts=tuple(2 * rows * part for part in range(parts)),
            skips=False,
            num_features=len(table.feature_names),
            lines=HashedLines(salts, [rows]),
        )

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [
            PhysicalTable(
                name=table.name,
                num_embeddings=2 * self.rows(table) * self.parts(table),
                embedding_dim=self.subvector_dim,
                lookups=tuple(
                    LookupKey(table.name, feature, part)
                    for feature in table.feature_names
                    for part in range(self.parts(table))
                ),
                init_fn=UniformInit.with_std(table.init_std / 2**0.5),
                data_type=table.data_type,
            )
            for table in tables
        ]

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        lookups = [
            (table, part)
            for table in tables
            for _ in table.feature_names
            for part in range(self.parts(table))
        ]
        route = ClusteredRoute(
            keys,
            [self._mapped(table) for table in tables],
            RangeCheck(tables),
            salts=[self._residual_salt(table, part) for table, part in lookups],
            firsts=[self.rows(table) * (2 * part + 1) for table, part in lookups],
            num_rows=[self.rows(table) for table, _ in lookups],
        )
        owners = [table for table in tables for _ in table.feature_names]
        came = [(t.name, self.parts(t) * self.subvector_dim, t.embedding_dim) for t in owners]
        exact = all(width == wanted for _, width, wanted in came)
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=route,
            combine=nn.Identity() if exact else FitWidths(came, projected=set()),
            ids_per_value=2,
        )

    def _residual_salt(self, table: TableSpec, part: int) -> int:
        return table_salt(self.seed, table.name, _salt(self.round, part, 1))

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        return Footprint(
            tuple(
                TensorFootprint(
                    name=f"{table.name}.codes",
                    role="codes",
                    rows=self._mapped(table).stored_bytes,
                    columns=1,
                    itemsize=1,
                    train_columns=1,
                    lookup=False,
                )
                for table in tables
            )
        )

    @override
    def stages(self) -> tuple[Stage, ...]:
        # A pass before each clustering; the last stage trains as long as the run is to.
        names = ["hashed", *(f"clustered_{n + 1}" for n in range(self.clusterings))]
        stages = [
            Stage(name=name, purpose="train, then cluster", epochs=1, keeps="last")
            for name in names
        ]
        last = replace(stages[-1], purpose="train what clustering left", epochs=None, keeps="best")
        return (*stages[:-1], last)

    @override
    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        tables, before = by_name(tables), past.before.config
        assert isinstance(before, CCE)
        after = replace(before, round=before.round + 1)
        weights = id_weights(tables, past.counts)
        found: dict[str, Tensor | RowSource] = {}
        codes: list[RowSource] = []
        for table, own in zip(tables, before._codes(tables, past.before)):
            work = NamedWork(past.work, f"cce-{table.name}")
            clustered = _Clustered(
                method=after,
                layout=SubvectorLayout(tables=[table], width=before.subvector_dim, sharing="table"),
                vectors=before._vectors(table, past.before.rows(table.name).whole(), own),
                weights=weights[table.name],
                work=work,
            )
            found[f"rows.{table.name}"], codes_of_table = clustered.rows_and_codes()
            codes.append(codes_of_table)
        found["route.codes"] = torch.cat([each.whole() for each in codes])
        return MethodState.of(after, found)

    def _codes(self, tables: Sequence[TableSpec], form: MethodState) -> list[RowSource]:
        """The packed map of each table."""
        stored: dict[str, Tensor | RowSource] = {**form.tensors, **form.sources}
        sizes = [self._mapped(table).stored_bytes for table in tables]
        return list(as_rows(stored["route.codes"]).split(sizes))

    def _vectors(self, table: TableSpec, rows: Tensor, codes: RowSource) -> RowSource:
        """(N, parts, subvector_dim) float32, what all ids look up now.

        Args:
            table: the table.
            rows: of both tables of all parts.
            codes: its map, packed.
        """
        mapped, parts = self._mapped(table), self.parts(table)
        bits, count = mapped.bits, self.rows(table)
        places = torch.arange(parts)
        salts = torch.tensor([self._residual_salt(table, part) for part in range(parts)])

        def read(start: int, stop: int) -> Tensor:
            first = start * parts * bits // 8
            stream = codes.read(first, stream_bytes(stop * parts, bits))
            begins = torch.arange(start * parts, stop * parts) * bits - 8 * first
            own = gather_codes(stream, begins.view(-1, parts), (1 << bits) - 1, bits)
            ids = torch.arange(start, stop).unsqueeze(1)
            hashed = hash_rows(ids, salts, torch.tensor(count))
            return (
                rows[own + 2 * count * places] + rows[hashed + count * (2 * places + 1)]
            ).float()

        shape = (table.num_embeddings, parts, self.subvector_dim)
        return ComputedRows(shape, torch.float32, read, of=[codes])


def _salt(round_: int, part: int, kind: int) -> int:
    """Which of a table's salts a part has in a round."""
    return (round_ * _ROUNDS + part) * 2 + kind


@dataclass(frozen=True, kw_only=True)
class _Clustered:
    """A table whose parts are clustered.

    Args:
        method: that holds it afterwards.
        layout: of this table alone.
        vectors: (N, parts, w) what its ids look up.
        weights: (N,) float64 what they count.
        work: does it.
    """

    method: CCE
    layout: SubvectorLayout
    vectors: RowSource
    weights: RowSource
    work: Work

    @property
    def table(self) -> TableSpec:
        return self.layout.tables[0]

    def rows_and_codes(self) -> tuple[Tensor, RowSource]:
        """(2 R parts, w) the rows of all parts, those of `T` first in each; and the packed map."""
        name, count = self.table.name, self.method.rows(self.table)
        latents = Latents(
            layout=self.layout,
            rows={name: self.vectors},
            weights={name: self.weights},
            work=self.work,
        )
        shared = share_cold_rows(latents)
        books = cluster(
            shared,
            count=count,
            seed=self.method.seed + self.method.round,
            scaled=False,
            backend=self.method.clustering,
        )
        left = self._left(shared, books)
        codes = self._packed(shared, books)
        return torch.stack([books.words, left], dim=1).flatten(0, 2), codes

    def _left(self, latents: Latents, books: Codebooks) -> Tensor:
        """(parts, R, w) the mean of what centroids leave of the ids of each hash."""
        table, parts = self.table, self.method.parts(self.table)
        count, width = self.method.rows(table), self.method.subvector_dim
        places = torch.arange(parts)
        salts = torch.tensor([self.method._residual_salt(table, part) for part in range(parts)])

        def sums(block: RowBlock) -> dict[str, Tensor]:
            vectors = latents.rows[block.table].read(block.start, block.stop).float()
            mass = latents.weights[block.table].read(block.start, block.stop)
            codes = encode(self.layout, 0, vectors, books)
            rest = (vectors - books.words[places, codes]).double() * mass[:, None, None]
            ids = torch.arange(block.start, block.stop).unsqueeze(1)
            slots = (hash_rows(ids, salts, torch.tensor(count)) + count * places).flatten()
            own = rest.new_zeros(parts * count, width).index_add_(0, slots, rest.flatten(0, 1))
            masses = mass.repeat_interleave(parts)
            return {
                "rest": own,
                "mass": mass.new_zeros(parts * count).index_add_(0, slots, masses),
            }

        found = add_up(self.work, "rest", sums, latents.blocks(table))
        mass = found["mass"].unsqueeze(1)
        mean = torch.where(mass > 0, found["rest"] / mass.clamp(min=1e-300), 0.0)
        return mean.float().view(parts, count, width)

    def _packed(self, latents: Latents, books: Codebooks) -> RowSource:
        mapped, parts = self.method._mapped(self.table), self.method.parts(self.table)
        blocks = latents.blocks(self.table)

        def pack(block: RowBlock) -> Tensor:
            vectors = latents.rows[block.table].read(block.start, block.stop).float()
            codes = encode(self.layout, 0, vectors, books)
            return torch.from_numpy(packed(codes.reshape(-1).numpy(), mapped.bits))

        sizes = [stream_bytes(len(block) * parts, mapped.bits) for block in blocks]
        return self.work.write("codes", pack, blocks, (sum(sizes),), torch.uint8, sizes=sizes)


class ClusteredRoute(MappedRoute):
    """Looks up, for each part of an id, the row that its code names and one that a hash chooses.

    Args:
        keys: names of the look-ups, part after part within each feature.
        tables: in the order of the buffers.
        check: refuses ids that are out of range.
        salts: for each look-up, the signed 64-bit salt of its hash.
        firsts: for each, where the rows of its hash begin.
        num_rows: for each, how many they are.
    """

    def __init__(
        self,
        keys: Sequence[str],
        tables: Sequence[MappedTable],
        check: nn.Module,
        *,
        salts: Sequence[int],
        firsts: Sequence[int],
        num_rows: Sequence[int],
    ) -> None:
        super().__init__(keys, tables, check, side_by_side=True)
        self._hashes = Constant.stacked(Constant(salts), Constant(firsts), Constant(num_rows))

    @override
    def fused_routes(self) -> None:
        """Not told: a row behind others by hash alone has no name there."""

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        copies = self.copies(self.check(features))
        coded = self.coded_rows(copies).squeeze(-1)
        ids, (salts, firsts, num_rows) = beside_ids(copies, self._hashes)
        hashed = hash_rows(ids, salts, num_rows).add_(firsts)
        return widened(copies, self._keys, torch.stack((coded, hashed), dim=-1), 2)
