"""Narrow latents that a small matrix widens: `e = concat_j(z_j P)`, or one `z P` for a whole row.

With one sub-vector a row it is the factorisation of Lan et al., "ALBERT", ICLR 2020 (section 3.1); with
several it is the low-rank stage of Zhu, Zhou, Zhong, "Learning Low-Rank Representations for Model
Compression", IJCNN 2023, https://arxiv.org/abs/2211.11397, in which sub-vectors are later clustered.

Without a bias it is linear in the looked-up latents, so bags are pooled before they are widened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from embcomp.backends.base import (
    Backend,
    BackendConfig,
    FollowedForm,
    FollowInputs,
    MethodState,
    StageInputs,
)
from embcomp.backends.codebooks.clustering import id_weights
from embcomp.backends.codebooks.subvectors import (
    Decode,
    Sharing,
    SharingGroups,
    SubvectorLayout,
    check_sharing,
)
from embcomp.backends.codebooks.vector_quantized import projection_footprint
from embcomp.backends.full import Full, FullRoute, RangeCheck
from embcomp.backends.stages import Stage
from embcomp.io.constraints import Ge, Le
from embcomp.layers.block_work import IN_MEMORY, RowBlock, Work, add_up, row_blocks
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.budget import largest_int
from embcomp.tables.footprint import Footprint
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit, by_name

DENSE = Stage(name="dense", purpose="train the full tables")
"""The first stage of methods that compress trained tables."""
NARROW = Stage(
    name="low_rank",
    purpose="train the best low-rank approximation on",
    epochs=1,
    learning_rate=0.2,
    keeps="best_or_start",
)
"""The stage after it, where latents take the place of rows."""


@dataclass(frozen=True, kw_only=True)
class LowRank(BackendConfig):
    """Latents as rows, and learnt projections. Ids must lie in `[0, num_embeddings)`.

    Args:
        latent_dim: width of a latent.
        subvector_dim: what one latent stands for; None for the whole embedding.
        projections: who shares a projection: `all` sub-vectors, those at one `position` of
            any table, or none but those of one `table` at one position.
        sharing_groups: names of tables that share among themselves alone; those that no group
            names are one more.
        bias: whether a projection adds a learnt vector; latents are then widened one by one.
        from_dense: whether to train full tables first and begin with their best approximation,
            rather than from random latents.
    """

    latent_dim: Annotated[int | None, Ge(1), Le(2**16)] = None
    subvector_dim: Annotated[int | None, Ge(1), Le(2**16)] = None
    projections: Sharing = "table"
    sharing_groups: SharingGroups = ()
    bias: bool = False
    from_dense: bool = True

    name: ClassVar[str] = "low_rank"
    approximates: ClassVar[bool] = True
    size_fields: ClassVar[tuple[str, ...]] = ("latent_dim",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sharing(self.name, "projections", self.projections, self.sharing_groups)

    def layout(self, tables: Sequence[TableSpec]) -> SubvectorLayout:
        """The sub-vectors of a group of tables."""
        widest = max(table.embedding_dim for table in tables)
        return SubvectorLayout(
            tables=tables,
            width=self.subvector_dim or widest,
            sharing=self.projections,
            groups=self.sharing_groups,
        )

    @override
    def named_tables(self) -> Sequence[str]:
        return list(chain.from_iterable(self.sharing_groups))

    def latent(self, tables: Sequence[TableSpec]) -> int:
        """Width of a latent: never more than what it stands for."""
        return min(self.latent_dim or 1, self.layout(tables).width)

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        layout, latent = self.layout([table]), self.latent([table])
        row = layout.positions(table) * latent * table.itemsize
        projections = self.dense_footprint([table]).serve_bytes
        return table.num_embeddings * row + projections >= table.full_bytes

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        layout = self.layout(tables)
        return latent_tables(layout, self.latent(tables))

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        layout = self.layout(tables)
        return Footprint((projection_footprint(layout, self.latent(tables), bias=self.bias),))

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        decode = Decode(self.layout(tables), latent_dim=self.latent(tables), bias=self.bias)
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=FullRoute(keys, RangeCheck(tables)),
            combine=decode,
            needs_unpooled_rows=self.bias,
        )

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        def fits(latent: int) -> bool:
            return self.with_size(latent_dim=latent).footprint(tables).serve_bytes <= budget

        latent = largest_int(fits, 1, self.layout(tables).width)
        return None if latent is None else self.with_size(latent_dim=latent)

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self.with_size(latent_dim=1)

    @override
    def stages(self) -> tuple[Stage, ...]:
        if not self.from_dense:
            return super().stages()
        return (DENSE, NARROW)

    @override
    def first_method(self) -> BackendConfig:
        return Full() if self.from_dense else self

    @override
    def start_stage(
        self, stage: Stage, tables: Sequence[TableSpec], past: StageInputs
    ) -> MethodState:
        found = factorise(self, tables, past.before, id_weights(tables, past.counts), past.work)
        return written(found, tables, past.work)

    @override
    def follow_ids(self, past: FollowInputs) -> FollowedForm:
        return FollowedForm.with_row_of_each_id(self, past)

    @override
    def approximate(self, tables: Sequence[TableSpec], past: StageInputs) -> MethodState:
        return self.start_stage(NARROW, tables, past)


def latent_tables(layout: SubvectorLayout, latent_dim: int) -> list[PhysicalTable]:
    """A physical table of latents for each logical one.

    Orthonormal projections make rows of the declared deviation of them.
    """
    return [
        PhysicalTable(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=layout.positions(table) * latent_dim,
            lookups=tuple(LookupKey(table.name, feature) for feature in table.feature_names),
            init_fn=UniformInit.with_std(table.init_std * (layout.width / latent_dim) ** 0.5),
            data_type=table.data_type,
        )
        for table in layout.tables
    ]


def factorise(
    config: LowRank,
    tables: Sequence[TableSpec],
    dense: MethodState,
    weights: Mapping[str, RowSource],
    work: Work = IN_MEMORY,
) -> MethodState:
    """The best approximation of full tables: principal axes of all sub-vectors that share.

    Rows of the approximation are made when they are read.

    Args:
        config: what to approximate with.
        tables: the group.
        dense: a form with the tables' full rows.
        weights: what each id counts, by table.
        work: measures the rows.
    """
    tables = by_name(tables)
    layout, latent = config.layout(tables), config.latent(tables)
    rows = {table.name: dense.rows(table.name) for table in tables}
    moments = Moments.of(layout, rows, weights, centred=config.bias, work=work)
    axes = moments.axes()[:, :latent]  # (G, d, m)
    tensors: dict[str, Tensor | RowSource] = {
        f"rows.{table.name}": _projected(
            rows[table.name], layout, moments.means[which], axes[which]
        )
        for n, table in enumerate(tables)
        for which in [layout.shared_by(n)]
    }
    tensors["combine.projections.weight"] = axes.float()
    if config.bias:
        tensors["combine.projections.bias"] = moments.means.float()
    return MethodState.of(config, tensors)


def _projected(rows: RowSource, layout: SubvectorLayout, means: Tensor, axes: Tensor) -> RowSource:
    """(N, positions * d) latents of (N, embedding_dim) rows.

    Args:
        rows: of a table.
        layout: the group's sub-vectors.
        means: (positions, m) what is taken out.
        axes: (positions, d, m).
    """

    def latents(start: int, stop: int) -> Tensor:
        cut = layout.cut(rows.read(start, stop)).double() - means
        return torch.einsum("rjm,jdm->rjd", cut, axes).flatten(1).to(rows.dtype)

    shape = (len(rows), axes.shape[0] * axes.shape[1])
    return ComputedRows(shape, rows.dtype, latents, of=[rows])


def written(form: MethodState, tables: Sequence[TableSpec], work: Work) -> MethodState:
    """The same with rows that are stored."""
    tensors: dict[str, Tensor | RowSource] = dict(form.tensors)
    for table in tables:
        rows = form.rows(table.name)
        tensors[f"rows.{table.name}"] = work.write(
            f"rows.{table.name}",
            lambda block, rows=rows: rows.read(block.start, block.stop),  # type: ignore[misc]
            row_blocks(table.name, table.num_embeddings, table.embedding_dim),
            rows.shape,
            rows.dtype,
        )
    return MethodState.of(form.config, tensors)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Weighted moments of the sub-vectors that share, in float64.

    Args:
        masses: (G,) sums of weights.
        means: (G, m); zeros where nothing is centred.
        seconds: (G, m, m) mean products, centred or not.
    """

    masses: Tensor
    means: Tensor
    seconds: Tensor

    @classmethod
    def of(
        cls,
        layout: SubvectorLayout,
        rows: Mapping[str, RowSource],
        weights: Mapping[str, RowSource],
        *,
        centred: bool,
        scales: Sequence[float] | None = None,
        work: Work = IN_MEMORY,
    ) -> Moments:
        """Measure the tables' full rows.

        Args:
            layout: the group's sub-vectors.
            rows: by table, (N, embedding_dim).
            weights: by table, (N,).
            centred: whether the mean is taken out.
            scales: what each table's rows are divided by.
            work: adds them up.
        """
        count, width = layout.num_shared, layout.width
        masses = torch.zeros(count, dtype=torch.float64)
        sums = torch.zeros(count, width, dtype=torch.float64)
        seconds = torch.zeros(count, width, width, dtype=torch.float64)
        for n, table in enumerate(layout.tables):
            which = torch.tensor(layout.shared_by(n))
            scale = 1.0 if scales is None else scales[n]
            measure = _Measure(layout, rows[table.name], weights[table.name], scale)
            blocks = row_blocks(table.name, table.num_embeddings, table.embedding_dim)
            own = add_up(work, f"moments-{table.name}", measure, blocks)
            masses.index_add_(0, which, own["mass"].expand(len(which)))
            sums.index_add_(0, which, own["sum"])
            seconds.index_add_(0, which, own["second"])
        safe = masses.clamp(min=1e-300)
        means = sums / safe[:, None] if centred else torch.zeros_like(sums)
        seconds = seconds / safe[:, None, None] - means[:, :, None] * means[:, None, :]
        return cls(masses=masses, means=means, seconds=seconds)

    def axes(self) -> Tensor:
        """(G, m, m): principal axes as rows, those of most variance first, of a fixed sign."""
        _, vectors = torch.linalg.eigh(self.seconds)
        axes = vectors.flip(2).transpose(1, 2)
        largest = axes.abs().argmax(2, keepdim=True)
        return axes * axes.gather(2, largest).sign()

    def variances(self) -> Tensor:
        """(G, m): along the axes, falling."""
        return torch.linalg.eigvalsh(self.seconds).flip(1).clamp(min=0)


@dataclass(frozen=True)
class _Measure:
    """The sums of a block of rows."""

    layout: SubvectorLayout
    rows: RowSource
    weights: RowSource
    scale: float

    def __call__(self, block: RowBlock) -> dict[str, Tensor]:
        mass = self.weights.read(block.start, block.stop).double()
        cut = self.layout.cut(self.rows.read(block.start, block.stop)).double() / self.scale
        weighted = cut * mass[:, None, None]
        return {
            "mass": mass.sum(),
            "sum": weighted.sum(0),
            "second": torch.einsum("njm,njo->jmo", weighted, cut),
        }
