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
    Latents,
    find_codewords,
    id_weights,
    share_cold_rows,
)
from embcomp.backends.codebooks.kmeans import Clustering
from embcomp.backends.codebooks.nearest import nearest
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
from embcomp.layers.block_work import NamedWork, RowBlock, Work, block_rows, row_blocks
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.layers.mapped_copy import MappedCopy
from embcomp.layers.routing import beside_ids
from embcomp.layers.row_sources import ComputedRows, JoinedRows, RowSource
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
            clustered = _Clustered(
                before=_Parts(method=before, table=table, codes=own),
                after=after,
                rows=MappedCopy(past.before.rows(table.name), f"the rows of {table.name}"),
                weights=weights[table.name],
                work=NamedWork(past.work, f"cce-{table.name}"),
            )
            found[f"rows.{table.name}"], codes_of_table = clustered.rows_and_codes()
            codes.append(codes_of_table)
        found["route.codes"] = JoinedRows(codes)
        return MethodState.of(after, found)

    def _codes(self, tables: Sequence[TableSpec], form: MethodState) -> list[RowSource]:
        """The packed map of each table."""
        sizes = [self._mapped(table).stored_bytes for table in tables]
        return form.source("route.codes").split(sizes)


def _salt(round_: int, part: int, kind: int) -> int:
    """Which of a table's salts a part has in a round."""
    return (round_ * _ROUNDS + part) * 2 + kind


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Which rows the parts of a table's ids have in a round.

    Args:
        method: in that round.
        table: the table.
        codes: its map, packed.
    """

    method: CCE
    table: TableSpec
    codes: RowSource

    def coded(self, start: int, stop: int, places: Tensor) -> Tensor:
        """(stop - start, P) int64 which rows of `T` some parts of a range of ids have.

        Args:
            start: the first id.
            stop: the one after the last.
            places: (P,) int64 the parts.
        """
        bits, parts = self.method._mapped(self.table).bits, self.method.parts(self.table)
        first = start * parts * bits // 8
        stream = self.codes.read(first, stream_bytes(stop * parts, bits))
        ids = torch.arange(start, stop).unsqueeze(1)
        return gather_codes(
            stream, (ids * parts + places) * bits - 8 * first, (1 << bits) - 1, bits
        )

    def hashed(self, start: int, stop: int, places: Tensor) -> Tensor:
        """The same of `T'`."""
        salts = [self.method._residual_salt(self.table, part) for part in places.tolist()]
        ids = torch.arange(start, stop).unsqueeze(1)
        return hash_rows(ids, torch.tensor(salts), torch.tensor(self.method.rows(self.table)))

    def looked_up(self, rows: MappedCopy, places: Tensor) -> RowSource:
        """(N, P, subvector_dim) float32, what all ids look up.

        Args:
            rows: of both tables of all parts.
            places: (P,) int64 the parts that are wanted.
        """
        count = self.method.rows(self.table)
        firsts = 2 * count * places

        def read(start: int, stop: int) -> Tensor:
            own, anywhere = self.coded(start, stop, places), rows.tensor()
            hashed = self.hashed(start, stop, places)
            return (anywhere[own + firsts] + anywhere[hashed + (firsts + count)]).float()

        shape = (self.table.num_embeddings, len(places), self.method.subvector_dim)
        return ComputedRows(shape, torch.float32, read, of=[self.codes])


@dataclass(frozen=True, kw_only=True)
class _Clustered:
    """A table whose parts are clustered: by blocks of ids, or one part after another.

    Args:
        before: what its ids look up.
        after: the method that holds it afterwards.
        rows: those that are looked up.
        weights: (N,) float64 what its ids count.
        work: does it.
    """

    before: _Parts
    after: CCE
    rows: MappedCopy
    weights: RowSource
    work: Work

    @property
    def table(self) -> TableSpec:
        return self.before.table

    @property
    def count(self) -> int:
        return self.after.rows(self.table)

    @property
    def parts(self) -> range:
        return range(self.after.parts(self.table))

    @property
    def blocks(self) -> list[RowBlock]:
        return row_blocks(self.table.name, self.table.num_embeddings, self.table.embedding_dim)

    def rows_and_codes(self) -> tuple[RowSource, RowSource]:
        """(2 R parts, w) the rows of all parts, those of `T` first in each; and the packed map."""
        name, width = self.table.name, self.after.subvector_dim
        latents = Latents(
            layout=SubvectorLayout(tables=[self.table], width=width, sharing="table"),
            rows={name: self.before.looked_up(self.rows, torch.tensor(self.parts))},
            weights={name: self.weights},
            work=self.work,
        )
        shared = share_cold_rows(latents)
        words = find_codewords(
            shared,
            (1.0,),
            count=self.count,
            seed=self.after.seed + self.after.round,
            backend=self.after.clustering,
        )
        codes = self._packed(shared.rows[name], words)
        left = self._left(words, codes)
        bounds = [(part * self.count, (part + 1) * self.count) for part in self.parts]
        rows = [each.range(*own) for own in bounds for each in (words, left)]
        return JoinedRows(rows), codes

    def _packed(self, vectors: RowSource, words: RowSource) -> RowSource:
        """The map to the nearest centroids: (bytes,) uint8.

        Args:
            vectors: (N, parts, w).
            words: (R parts, w) the centroids.
        """
        bits = self.after._mapped(self.table).bits

        def pack(block: RowBlock) -> Tensor:
            codes = self._nearest(vectors.read(block.start, block.stop), words)
            return torch.from_numpy(packed(codes.reshape(-1).numpy(), bits))

        sizes = [stream_bytes(len(block) * len(self.parts), bits) for block in self.blocks]
        return self.work.write("codes", pack, self.blocks, (sum(sizes),), torch.uint8, sizes=sizes)

    def _nearest(self, vectors: Tensor, words: RowSource) -> Tensor:
        """(n, parts) int64; so many parts at once that their centroids are a block, or one."""
        at_once = max(1, block_rows(self.after.subvector_dim) // self.count)
        found = []
        for own in torch.tensor(self.parts).split(at_once):
            first, last = int(own[0]), int(own[-1]) + 1
            books = words.read(first * self.count, last * self.count)
            books = books.unflatten(0, (-1, self.count))
            found.append(nearest(vectors[:, first:last], books, own - first))
        return torch.cat(found, dim=1)

    def _left(self, words: RowSource, codes: RowSource) -> RowSource:
        """(R parts, w) the mean of what centroids leave of the ids of each hash.

        Args:
            words: (R parts, w) the centroids.
            codes: the map to them, packed.
        """
        after = _Parts(method=self.after, table=self.table, codes=codes)

        def left(part: int) -> Tensor:
            place = torch.tensor([part])
            vectors = self.before.looked_up(self.rows, place)
            centroids = words.read(part * self.count, (part + 1) * self.count)
            rests = torch.zeros(self.count, self.after.subvector_dim, dtype=torch.float64)
            masses = rests.new_zeros(self.count)
            for block in self.blocks:
                own = block.start, block.stop
                mass = self.weights.read(*own)  # 0 where an id never occurs
                rest = vectors.read(*own)[:, 0] - centroids[after.coded(*own, place)[:, 0]]
                slots = after.hashed(*own, place)[:, 0]
                sums = torch.zeros_like(rests)
                rests += sums.index_add_(0, slots, rest.double() * mass.unsqueeze(1))
                masses += torch.zeros_like(masses).index_add_(0, slots, mass)
            masses.unsqueeze_(1)
            return torch.where(masses > 0, rests / masses.clamp(min=1e-300), 0.0).float()

        shape = (self.count * len(self.parts), self.after.subvector_dim)
        sizes = [self.count] * len(self.parts)
        return self.work.write("left", left, self.parts, shape, torch.float32, sizes=sizes)


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
