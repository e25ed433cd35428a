"""LR2VQ: sub-vectors as codewords of a low-rank space.

Zhu, Zhou, Zhong, "Learning Low-Rank Representations for Model Compression", IJCNN 2023,
https://arxiv.org/abs/2211.11397. A row is cut into sub-vectors; each is a latent of `d` numbers that
a projection widens; latents are clustered, so that a row is stored as a few codes. The bytes follow
from the sub-vectors' width and the number of codewords, while `d` is free.

The paper compresses convolutions and we could read its outline only, so the stages are ours, put
together from methods whose code is public: a low-rank model is trained on from the dense one; its
latents are clustered and trained with the codewords in their place (`embcomp.backends.codebooks.codewords`);
then codes are frozen and codewords trained (Martinez et al., "Permute, Quantize, and Fine-tune", CVPR
2021). With `latent_dim` as wide as the sub-vector and `from_dense: false` it is the vector-quantised
form of DPQ (Chen, Li, Sun, "Differentiable Product Quantization", ICML 2020), but for codes, which
are chosen in every look-up, and so are never out of date for ids that are seldom seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self, override

from embcomp.backends.base import (
    Backend,
    BackendConfig,
    MethodState,
    SearchContext,
    StageInputs,
    full_table,
)
from embcomp.backends.codebooks.clustered import MEASURE, Clustered
from embcomp.backends.codebooks.clustering import (
    Codebooks,
    Latents,
    cluster,
    id_weights,
    share_cold_rows,
)
from embcomp.backends.codebooks.coded import FREEZE, Coded, codebook_rows, write_codes
from embcomp.backends.codebooks.codewords import Codewords, Quantize
from embcomp.backends.codebooks.latent_choice import LatentChoice, choose_latent_dim
from embcomp.backends.codebooks.low_rank import (
    DENSE,
    NARROW,
    LowRank,
    factorise,
    latent_tables,
    written,
)
from embcomp.backends.codebooks.subvectors import Decode, Sharing
from embcomp.backends.codebooks.vector_quantized import (
    mean_init_std,
    projection_footprint,
    scales_footprint,
)
from embcomp.backends.full import Full, FullRoute, RangeCheck
from embcomp.backends.stages import Stage
from embcomp.errors import ConfigError
from embcomp.io.constraints import Between, Ge, Le
from embcomp.layers.block_work import Work
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.footprint import Footprint, TensorFootprint, footprint_of
from embcomp.tables.specs import PhysicalTable, TableSpec, by_name

_AUTO = "auto"
_LATENT_SHARES = 4  # a budget chooses among latents of a quarter, half... of a sub-vector


@dataclass(frozen=True, kw_only=True)
class LR2VQ(Clustered):
    """Latents snapped to codewords, then widened. Ids must lie in `[0, num_embeddings)`.

    Args:
        codebooks: as in `pq`, for projections too. Tables differ in what few dimensions their
            rows need, so each has its own by default.
        latent_dim: width of a latent; half of `subvector_dim` when not given. `auto` chooses
            it from the trained full tables.
        factored: whether to serve codewords and projections apart where that takes fewer bytes
            than their products. Not with `auto`, whose bytes must not depend on the choice.
        commitment: weight of the squared distance of latents from their codewords.
        decay: of the moving means that codewords are, in a step.
        revive_every: steps between two searches for codewords that nobody chose.
        from_dense: whether to begin with full tables and their low-rank approximation, rather
            than from random latents.
    """

    codebooks: Sharing = "table"
    latent_dim: Annotated[int | Literal["auto"] | None, Ge(1), Le(2**16)] = None
    factored: bool = True
    commitment: Annotated[float, Ge(0), Le(10**6)] = 0.25
    decay: Annotated[float, Between(0, 1, "[)")] = 0.99
    revive_every: Annotated[int, Ge(1)] = 100
    from_dense: bool = True

    name: ClassVar[str] = "lr2vq"
    approximates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_dim == _AUTO and not self.from_dense:
            raise ConfigError(
                f"{self.name}: latent_dim: auto looks at trained full tables, which from_dense: "
                "false never has; give a number"
            )
        if self.learns_size and not self.from_dense:
            raise ConfigError(
                f"{self.name}: choose: measured looks at trained full tables, which from_dense: false "
                "never has; give a number"
            )

    @property
    def latent(self) -> int:
        """Width of a latent, as far as it is known before training."""
        given = self.latent_dim if isinstance(self.latent_dim, int) else math.ceil(self.width / 2)
        return min(given, self.width)

    @property
    @override
    def stored_latent(self) -> int | None:
        if self.latent_dim == _AUTO or not self.factored:
            return None
        whole = self.codewords * self.width
        apart = self.codewords * self.latent + self.latent * self.width
        return self.latent if apart < whole else None

    @override
    def latents(self, width: int) -> Sequence[int | None]:
        if self.latent_dim is not None:
            return (None,)
        shares = range(1, _LATENT_SHARES + 1)
        return sorted({-(-width * share // _LATENT_SHARES) for share in shares})

    @override
    def _sized(self, width: int, count: int, latent: int | None) -> Self:
        return replace(
            self,
            budget=None,
            subvector_dim=width,
            num_codewords=count,
            latent_dim=self.latent_dim if latent is None else latent,
        )

    @property
    @override
    def expected_latent(self) -> int:
        return self.width if self.latent_dim == _AUTO else self.latent

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
            latent_dim=self.stored_latent,
        )

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        self.codebook_tables(tables)  # refuses tables that cannot share
        return latent_tables(self.layout(tables), self.latent)

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        served = footprint_of(self.serving.physical_tables(tables)).tensors
        served += self.beside_codewords(tables, trained=False).tensors
        return Footprint(
            tuple(replace(tensor, trained=False) for tensor in served)
            + tuple(replace(tensor, served=False) for tensor in self._learners(tables))
        )

    def _learners(self, tables: Sequence[TableSpec]) -> list[TensorFootprint]:
        """What training holds beside the latents."""
        layout = self.layout(tables)
        words = TensorFootprint(
            name=f"{tables[0].name}.codewords",
            role="codebook",
            rows=layout.num_shared * self.codewords,
            columns=self.latent + 3,
            itemsize=4,
            train_columns=self.latent + 3,
            lookup=False,
        )
        steps = replace(words, name=f"{tables[0].name}.steps", rows=1, train_columns=1, itemsize=8)
        learners = [words, steps, projection_footprint(layout, self.latent)]
        return [*learners, scales_footprint(tables, trained=True)] if self.scaled else learners

    @override
    def footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        self.require_size()
        small = [table for table in tables if not self.keeps_full(table)]
        total = footprint_of(full_table(table) for table in tables if self.keeps_full(table))
        if small:
            total += footprint_of(self.physical_tables(small), served=False)
            total += self.dense_footprint(small) + self._spare(small)
        return total

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        layout = self.layout(tables)
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        mean = mean_init_std(tables)
        codewords = Codewords(
            layout.units,
            self.codewords,
            self.latent,
            decay=self.decay,
            revive_every=self.revive_every,
            std=mean * (self.width / self.latent) ** 0.5,
            seed=self.seed,
        )
        scales = [1.0] * len(tables) if self.scaled else None
        decode = Decode(layout, latent_dim=self.latent, scales=scales)
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=FullRoute(keys, RangeCheck(tables)),
            combine=Quantize(layout, codewords, decode, commitment=self.commitment),
            needs_unpooled_rows=True,
            needs_context=True,
            sees_every_row=True,
        )

    @override
    def stages(self) -> tuple[Stage, ...]:
        # Trained tables overfit with every further pass, and Adagrad begins each stage with steps
        # as long as its rate: so the rates fall from stage to stage. Only an approximation has much
        # to regain. Codewords were trained with the latents, and hardly move once codes are frozen.
        quantize = Stage(
            name="quantize",
            purpose="train latents with the nearest codewords in their place",
            epochs=1,
            learning_rate=0.003,
            keeps="best_or_start",
        )
        if not self.from_dense:
            quantize = replace(quantize, epochs=None, learning_rate=1.0, keeps="best")
            return (quantize, FREEZE)
        freeze = replace(FREEZE, learning_rate=0.001)
        choice = Stage(name="latent_dim", purpose="choose the width of latents", kind="search")
        chosen = (choice,) if self.latent_dim == _AUTO else ()
        if self.learns_size:
            chosen = (MEASURE,)
        narrow = (NARROW,) if self._may_narrow else ()
        return (DENSE, *chosen, *narrow, quantize, freeze)

    @property
    def _may_narrow(self) -> bool:
        """Whether latents may be narrower than sub-vectors; else no approximation is to be trained."""
        known = self.subvector_dim is not None and not self.learns_size
        return self.latent_dim == _AUTO or not known or self.latent < self.width

    @override
    def first_method(self) -> BackendConfig:
        return Full() if self.from_dense else self

    @override
    def training_forms(self, tables: Sequence[TableSpec]) -> tuple[BackendConfig, ...]:
        latent = self.width if self.latent_dim == _AUTO else self.latent
        quantized = replace(self, latent_dim=latent, factored=self.stored_latent is not None)
        if not self.from_dense:
            return (quantized, self.serving)
        narrow = (self._low_rank(latent),) if self._may_narrow else ()
        return (Full(), *narrow, quantized, self.serving)

    def _low_rank(self, latent: int) -> LowRank:
        return LowRank(
            latent_dim=latent,
            subvector_dim=self.width,
            projections=self.codebooks,
            sharing_groups=self.sharing_groups,
        )

    @override
    def search(
        self, stage: Stage, tables: Sequence[TableSpec], context: SearchContext
    ) -> Mapping[str, Any]:
        if stage.name == MEASURE.name:
            return super().search(stage, tables, context)
        choice = self._choice(tables, context.form, context.counts, context.work)
        for line in choice.lines():
            context.say(line)
        return choice.document()

    def _choice(
        self,
        tables: Sequence[TableSpec],
        form: MethodState,
        counts: Mapping[str, Tensor],
        work: Work,
    ) -> LatentChoice:
        """The width of latents that trained full tables ask for."""
        tables = by_name(tables)
        return choose_latent_dim(
            self.layout(tables),
            {table.name: form.rows(table.name) for table in tables},
            id_weights(tables, counts),
            count=self.codewords,
            scaled=self.scaled,
            seed=self.seed,
            backend=self.clustering,
            work=work,
        )

    @override
    def approximate(self, tables: Sequence[TableSpec], past: StageInputs) -> MethodState:
        own = self
        if self.latent_dim == _AUTO:
            choice = self._choice(tables, past.before, past.counts, past.work)
            own = replace(self, latent_dim=choice.latent_dim, factored=False)
        weights = id_weights(tables, past.counts)
        low_rank = factorise(own._low_rank(own.latent), tables, past.before, weights, past.work)
        found = own._quantized(tables, low_rank, weights, past.work)
        assert isinstance(found.config, LR2VQ)
        return found.config.frozen(tables, found, past.work)

    @override
    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        if stage.name == "codes":
            assert isinstance(past.before.config, LR2VQ)
            return past.before.config.frozen(tables, past.before, past.work)
        weights, work = id_weights(tables, past.counts), past.work
        settled = self.settled(past.results)
        if isinstance(past.before.config, LowRank):
            return settled._quantized(tables, past.before, weights, work)
        chosen = past.results.get("latent_dim", {}).get("latent_dim", settled.latent)
        found = factorise(settled._low_rank(chosen), tables, past.before, weights, work)
        if stage.name == "quantize":
            return settled._quantized(tables, found, weights, work)
        return written(found, tables, work)

    def _quantized(
        self,
        tables: Sequence[TableSpec],
        low_rank: MethodState,
        weights: Mapping[str, RowSource],
        work: Work,
    ) -> MethodState:
        """Cluster the latents of a low-rank form, made orthonormal first.

        Only then is the distance of two latents that of the sub-vectors which they stand for.
        """
        assert isinstance(low_rank.config, LowRank)
        tables = by_name(tables)
        layout, latent = self.layout(tables), low_rank.config.latent(tables)
        projection = low_rank.tensors["combine.projections.weight"].double()  # (G, d, m)
        basis, turn = torch.linalg.qr(projection.transpose(1, 2))  # P^T = basis @ turn
        turned = {
            table.name: _turned(low_rank.rows(table.name), turn[layout.shared_by(n)])
            for n, table in enumerate(tables)
        }
        latents = share_cold_rows(
            Latents(layout=layout, rows=turned, weights=weights, work=work)
        ).in_single_precision()
        found = cluster(
            latents,
            count=self.codewords,
            seed=self.seed,
            scaled=self.scaled,
            backend=self.clustering,
        )
        tensors: dict[str, Tensor | RowSource] = {
            f"rows.{table.name}": _scaled(table, latents, scale)
            for table, scale in zip(tables, found.scales)
        }
        size = found.words.shape[:2]
        tensors |= {
            "combine.codewords.words": found.words,
            "combine.codewords.masses": torch.full(size, 1 / size.numel()),
            "combine.codewords.uses": torch.zeros(size),
            "combine.codewords.errors": torch.zeros(size),
            "combine.codewords.steps": torch.zeros(1, dtype=torch.int64),
            "combine.decode.projections.weight": basis.transpose(1, 2).float().contiguous(),
        }
        if self.scaled:
            tensors["combine.decode.scales.weight"] = torch.tensor(found.scales)
        settled = replace(self, latent_dim=latent, factored=self.stored_latent is not None)
        return MethodState.of(settled, tensors)

    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """Freeze the code of every id, and fold the projections into the codewords."""
        return self.frozen(tables, form, form.work)

    def frozen(self, tables: Sequence[TableSpec], form: MethodState, work: Work) -> MethodState:
        """The serving form, as `compact` gives it.

        Args:
            tables: the group, without those that stay full.
            form: a form of this method.
            work: chooses the codes.
        """
        tables = by_name(tables)
        serving = self.serving
        latents = Latents(
            layout=self.layout(tables),
            rows={table.name: _split(form.rows(table.name), self.latent) for table in tables},
            weights={},
            work=work,
        )
        words = form.tensors["combine.codewords.words"]
        codebooks = Codebooks(words=words, scales=(1.0,) * len(tables))
        projection = form.tensors["combine.decode.projections.weight"]
        stored = words if serving.latent_dim is not None else words @ projection
        tensors: dict[str, Tensor | RowSource] = {
            **codebook_rows(serving, tables, stored),
            "route.codes": write_codes(serving, latents, codebooks),
        }
        if serving.latent_dim is not None:
            tensors["combine.projections.weight"] = projection
        if self.scaled:
            tensors["combine.scales.weight"] = form.tensors["combine.decode.scales.weight"]
        return MethodState.of(serving, tensors)


def _split(rows: RowSource, latent: int) -> RowSource:
    """(N, positions * d) rows as (N, positions, d) latents."""
    return ComputedRows(
        (len(rows), rows.shape[1] // latent, latent),
        torch.float32,
        lambda a, b: rows.read(a, b).float().reshape(b - a, -1, latent),
        of=[rows],
    )


def _turned(rows: RowSource, turn: Tensor) -> RowSource:
    """(N, positions, d) float64 latents, each turned by the matrix of its position."""
    positions, latent = turn.shape[:2]

    def turned(start: int, stop: int) -> Tensor:
        own = rows.read(start, stop).double().reshape(stop - start, -1, latent)
        return torch.einsum("njd,jed->nje", own, turn)

    return ComputedRows((len(rows), positions, latent), torch.float64, turned, of=[rows])


def _scaled(table: TableSpec, latents: Latents, scale: float) -> RowSource:
    """(N, positions * d) latents without their table's scale, stored."""
    own = latents.rows[table.name]
    return latents.work.write(
        f"rows.{table.name}",
        lambda block: (own.read(block.start, block.stop) / scale).flatten(1),
        latents.blocks(table),
        (len(own), own.shape[1] * own.shape[2]),
        own.dtype,
    )
