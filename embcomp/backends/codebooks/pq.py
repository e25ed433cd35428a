"""Product quantisation of trained tables, and training of the codewords.

Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011; codewords are trained
on as in Martinez et al., "Permute, Quantize, and Fine-tune", CVPR 2021, without the permutation. It is
LR2VQ with latents as wide as sub-vectors and without the stages in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from embcomp.backends.base import Backend, BackendConfig, MethodState, StageInputs
from embcomp.backends.codebooks.clustered import MEASURE, Clustered
from embcomp.backends.codebooks.clustering import (
    Latents,
    cluster,
    cut_rows,
    id_weights,
    share_cold_rows,
)
from embcomp.backends.codebooks.coded import FREEZE, Coded, codebook_rows, write_codes
from embcomp.backends.codebooks.low_rank import DENSE
from embcomp.backends.codebooks.size_choice import size_of_least_error
from embcomp.backends.full import Full
from embcomp.backends.stages import Stage
from embcomp.layers.row_sources import RowSource
from embcomp.tables.footprint import Footprint
from embcomp.tables.specs import PhysicalTable, TableSpec, by_name


@dataclass(frozen=True, kw_only=True)
class PQ(Clustered):
    """Full tables, clustered when trained. Ids must lie in `[0, num_embeddings)`."""

    name: ClassVar[str] = "pq"
    approximates: ClassVar[bool] = True

    @property
    def serving(self) -> Coded:
        """The method that holds the tables once their codes are frozen."""
        return Coded(
            subvector_dim=self.width,
            num_codewords=self.codewords,
            codebooks=self.codebooks,
            sharing_groups=self.sharing_groups,
            scale=self.scale,
            seed=self.seed,
        )

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return self.serving.physical_tables(tables)

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        return self.serving.dense_footprint(tables)

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        return self.serving.build(tables)

    @override
    def stages(self) -> tuple[Stage, ...]:
        return (DENSE, MEASURE, FREEZE) if self.learns_size else (DENSE, FREEZE)

    @override
    def first_method(self) -> BackendConfig:
        return Full()

    @override
    def training_forms(self, tables: Sequence[TableSpec]) -> tuple[BackendConfig, ...]:
        return (Full(), self.serving)

    @override
    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        return self.settled(past.results)._clustered(by_name(tables), past)

    def _clustered(self, tables: Sequence[TableSpec], past: StageInputs) -> MethodState:
        layout = self.layout(tables)
        latents = share_cold_rows(
            Latents(
                layout=layout,
                rows={t.name: cut_rows(layout, past.before.rows(t.name)) for t in tables},
                weights=id_weights(tables, past.counts),
                work=past.work,
            )
        )
        found = cluster(
            latents,
            count=self.codewords,
            seed=self.seed,
            scaled=self.scaled,
            backend=self.clustering,
        )
        tensors: dict[str, Tensor | RowSource] = {
            **codebook_rows(self.serving, tables, found.words),
            "route.codes": write_codes(self.serving, latents, found),
        }
        if self.scaled:
            tensors["combine.scales.weight"] = torch.tensor(found.scales)
        return MethodState.of(self.serving, tensors)

    @override
    def fit_rows(self, tables: Sequence[TableSpec], budget: int, past: StageInputs) -> PQ:
        own = self._open() if self.learns_size else self
        others = own.largest_of_each_width(tables, budget)
        rows = {table.name: past.before.rows(table.name) for table in tables}
        weights = id_weights(tables, past.counts)
        candidates = others or [own.fit_budget(tables, budget)]
        return size_of_least_error(candidates, tables, rows, weights, past.work)

    @override
    def approximate(self, tables: Sequence[TableSpec], past: StageInputs) -> MethodState:
        return self.start_stage(FREEZE, tables, past)
