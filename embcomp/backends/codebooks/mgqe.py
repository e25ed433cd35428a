"""Multi-granular quantisation: frequent ids choose among all codewords, the others among the first of them.

Kang, Cheng, Chen, Yi, Lin, Hong, Chi, "Learning Multi-granular Quantized Embeddings for Large-Vocab Categorical
Features in Recommender Systems", WWW 2020 companion, https://arxiv.org/abs/2002.08530. Rare ids have seen too little
to tell many codewords apart, and are most of the ids: codes of fewer bits cost them little, and save most
of what codes take. Both read the same codebooks, of which the rare ids know a prefix.

Where we depart from the paper and public code:

- tables are trained whole, clustered, and then codewords are trained on with their codes frozen, as in `pq`; the
  paper quantises while it trains (differentiable product quantisation);
- the prefix is k-means of the rare ids' rows, and the rest of the codebook k-means of the frequent ones'; these
  take the nearest of all. The paper has one codebook whose prefix the rare ids are confined to;
- which ids are frequent follows from their numbers: the first, as prepared datasets have them, and what was counted
  is checked for it. Public code keeps a flag of 4 bytes for each id. Codes are packed to the bit, those of
  frequent and of rare ids each by themselves.

Above `shard_codes_above` both parts of the codes are dealt out to ranks, and asked for one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.backends.base import Backend, BackendConfig, MethodState, StageInputs
from embcomp.backends.codebooks.bit_packing import bits_for
from embcomp.backends.codebooks.clustering import (
    Codebooks,
    Latents,
    cluster,
    cut_rows,
    find_scales,
    id_weights,
    share_cold_rows,
)
from embcomp.backends.codebooks.coded import (
    FREEZE,
    Coded,
    CodedRoute,
    codebook_rows,
    write_codes,
)
from embcomp.backends.codebooks.expected_error import expected_error
from embcomp.backends.codebooks.kmeans import Clustering, missing_for
from embcomp.backends.codebooks.low_rank import DENSE
from embcomp.backends.codebooks.subvectors import Decode, SubvectorLayout
from embcomp.backends.codebooks.vector_quantized import VectorQuantized, code_bytes, mean_init_std
from embcomp.backends.full import Full, RangeCheck
from embcomp.backends.stages import Stage
from embcomp.errors import ConfigError
from embcomp.io.constraints import Between, Ge
from embcomp.layers.block_work import NamedWork
from embcomp.layers.constant_tensors import Constant
from embcomp.layers.id_counts import check_ranked
from embcomp.layers.routing import per_value, renamed
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.specs import TableSpec, by_name

_FEWER = 4  # times as few codewords for rare ids, as in the paper
_UNRANKED = "They are to have longer codes; number ids by falling frequency, as embcomp prepare does, or take pq"


@dataclass(frozen=True, kw_only=True)
class MGQE(VectorQuantized):
    """Full tables, clustered when trained, with longer codes for the first ids of each table.

    Args:
        frequent_share: share of a table's ids that choose among all codewords, at least one id.
        num_rare_codewords: of a codebook, those that the other ids choose among; by default a quarter.
        clustering: what runs k-means: `torch`, or `faiss` where it is installed.
    """

    frequent_share: Annotated[float, Between(0, 1, "()")] = 0.1
    num_rare_codewords: Annotated[int | None, Ge(2)] = None
    clustering: Clustering = "torch"

    name: ClassVar[str] = "mgqe"

    def __post_init__(self) -> None:
        super().__post_init__()
        rare, known = self.num_rare_codewords, self.num_codewords
        if rare is not None and known is not None and rare >= known:
            raise ConfigError(
                f"mgqe: num_rare_codewords must be less than num_codewords, got {rare} and {known}"
            )

    @property
    def rare_codewords(self) -> int:
        """Codewords that rare ids choose among."""
        return min(self.num_rare_codewords or max(2, self.codewords // _FEWER), self.codewords)

    def frequent_ids(self, table: TableSpec) -> int:
        """How many of a table's ids choose among all codewords, the first ones."""
        return max(1, int(table.num_embeddings * self.frequent_share))

    def _parts(self, tables: Sequence[TableSpec]) -> tuple[list[TableSpec], list[TableSpec]]:
        """The tables' frequent and rare ids, as tables of their own."""
        counts = [self.frequent_ids(table) for table in tables]
        frequent = [replace(t, num_embeddings=count) for t, count in zip(tables, counts)]
        left = [t.num_embeddings - count for t, count in zip(tables, counts)]
        return frequent, [replace(t, num_embeddings=count) for t, count in zip(tables, left)]

    def _coded(self, count: int) -> Coded:
        """Codes of so many codewords."""
        return Coded(
            subvector_dim=self.width,
            num_codewords=count,
            codebooks=self.codebooks,
            sharing_groups=self.sharing_groups,
            scale=self.scale,
            seed=self.seed,
        )

    @property
    @override
    def _shaping(self) -> tuple[object, ...]:
        return (*super()._shaping, self.name)

    @override
    def stored_code_bytes(self, table: TableSpec) -> int:
        positions = -(-table.embedding_dim // self.width)
        frequent = self.frequent_ids(table)
        rare = (table.num_embeddings - frequent) * positions
        return code_bytes(frequent * positions, self.bits) + code_bytes(
            rare, bits_for(self.rare_codewords)
        )

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return table.num_embeddings < 2 or super().keeps_full(table)

    @override
    def _expected_loss(self, layout: SubvectorLayout, table: int) -> float:
        points, own = self._points(layout, table), layout.tables[table]
        frequent = self.frequent_ids(own)
        shares = ((self.codewords, frequent), (self.rare_codewords, own.num_embeddings - frequent))
        return sum(
            ids * expected_error(points, width=self.width, latent=self.width, codewords=count)
            for count, ids in shares
        )

    @override
    def missing(self) -> str | None:
        return missing_for(self.clustering)

    @property
    @override
    def needs_ranked_ids(self) -> bool:
        return True

    @override
    def check_ids(self, tables: Sequence[TableSpec], counts: Mapping[str, Tensor]) -> None:
        for table in tables:
            check_ranked(self.name, table, counts, (self.frequent_ids(table),), _UNRANKED)

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        layout = self.layout(tables)
        frequent, rare = self._parts(tables)
        counts = self.codewords, self.rare_codewords
        routes = [
            CodedRoute(
                self.layout(part),
                count=count,
                bits=bits_for(count),
                seed=self.seed,
                book_size=self.codewords,
                checks=False,
            )
            for part, count in zip((frequent, rare), counts)
        ]
        cuts = [self.frequent_ids(table) for table in tables for _ in table.feature_names]
        scales = None
        if self.scaled:
            means = [mean_init_std(layout.members(unit)) for unit in range(len(layout.units))]
            scales = [t.init_std / means[layout.unit_of(n)] for n, t in enumerate(tables)]
        return Backend(
            physical_tables=self.physical_tables(tables),
            keys=layout.keys,
            route=GranularRoute(RangeCheck(tables), routes[0], routes[1], cuts, layout.keys),
            combine=Decode(layout, latent_dim=None, scales=scales),
        )

    @override
    def stages(self) -> tuple[Stage, ...]:
        return (DENSE, FREEZE)

    @override
    def first_method(self) -> BackendConfig:
        return Full()

    @override
    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        tables = by_name(tables)
        self.check_ids(tables, past.counts)
        layout = self.layout(tables)
        whole = share_cold_rows(
            Latents(
                layout=layout,
                rows={t.name: cut_rows(layout, past.before.rows(t.name)) for t in tables},
                weights=id_weights(tables, past.counts),
                work=past.work,
            )
        )
        scales = find_scales(whole, scaled=self.scaled)
        frequent, rare = self._latents(tables, whole, scales)
        rest = self.codewords - self.rare_codewords
        prefix = self._words(rare, self.rare_codewords)
        words = torch.cat([prefix, self._words(frequent, rest)], dim=1)
        ones = (1.0,) * len(tables)
        tensors: dict[str, Tensor | RowSource] = {
            **codebook_rows(self, tables, words),
            "route.frequent.codes": write_codes(
                self._coded(self.codewords), frequent, Codebooks(words=words, scales=ones)
            ),
            "route.rare.codes": write_codes(
                self._coded(self.rare_codewords), rare, Codebooks(words=prefix, scales=ones)
            ),
        }
        if self.scaled:
            tensors["combine.scales.weight"] = torch.tensor(scales)
        return MethodState.of(self, tensors)

    def _words(self, latents: Latents, count: int) -> Tensor:
        """(G, count, w) codewords for these rows."""
        return cluster(
            latents, count=count, seed=self.seed, scaled=False, backend=self.clustering
        ).words

    def _latents(
        self, tables: Sequence[TableSpec], whole: Latents, scales: Sequence[float]
    ) -> tuple[Latents, Latents]:
        """What is clustered, without the tables' scales: the rows of frequent ids, and of rare ones."""
        found = []
        for name, part in zip(("frequent", "rare"), self._parts(tables)):
            firsts = [0 if name == "frequent" else self.frequent_ids(table) for table in tables]
            found.append(
                Latents(
                    layout=self.layout(part),
                    rows={
                        t.name: _range_of(whole.rows[t.name], first, t.num_embeddings, 1 / scale)
                        for t, first, scale in zip(part, firsts, scales)
                    },
                    weights={
                        t.name: _range_of(whole.weights[t.name], first, t.num_embeddings)
                        for t, first in zip(part, firsts)
                    },
                    work=NamedWork(whole.work, name),
                )
            )
        return found[0], found[1]


def _range_of(source: RowSource, first: int, count: int, factor: float | None = None) -> RowSource:
    """So many rows from one on, multiplied by a factor if there is one."""

    def read(start: int, stop: int) -> Tensor:
        rows = source.read(start + first, stop + first)
        return rows if factor is None else rows * factor

    return ComputedRows((count, *source.shape[1:]), source.dtype, read, of=[source])


class GranularRoute(nn.Module):
    """Looks up the codes of frequent ids in one stream and those of all others in another.

    Args:
        check: refuses ids that are out of range.
        frequent: route of the first ids.
        rare: route of the others, counted from the first of them.
        cuts: for each (table, feature), the first rare id.
        keys: names of the look-ups.
    """

    def __init__(
        self,
        check: RangeCheck,
        frequent: CodedRoute,
        rare: CodedRoute,
        cuts: Sequence[int],
        keys: Sequence[str],
    ) -> None:
        super().__init__()
        self.check = check
        self.frequent = frequent
        self.rare = rare
        self._cuts = Constant(cuts)
        self._keys = list(keys)

    @override
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        features = self.check(features)
        names, ids = list(features.keys()), features.values().to(torch.int64)
        behind = ids - per_value(self._cuts.on(ids.device), features)
        is_rare = behind >= 0
        frequent = self.frequent(renamed(features, names, torch.where(is_rare, 0, ids)))
        rare = self.rare(renamed(features, names, behind.clamp(min=0)))
        # The same copies, one for each sub-vector, of which ids are rare.
        copies = self.rare.copies(renamed(features, names, is_rare.to(torch.int64)))
        rows = torch.where(copies.values().bool(), rare.values(), frequent.values())
        return renamed(frequent, self._keys, rows)
