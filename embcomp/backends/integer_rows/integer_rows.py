"""`int8`, `int16` and `alpt`: rows that are integers of 8 or 16 bits, in training too.

Li, Guo, Tang, Hou, Guo, Zhang, Li, "Adaptive Low-Precision Training for Embeddings in Click-Through Rate Prediction",
AAAI 2023, https://arxiv.org/abs/2212.05735. A row is integers and the step that they count. A training step makes
float weights of the looked-up rows, updates these, and rounds them stochastically to integers again; nothing keeps
float rows beside. `int8` and `int16` have a fixed step, or one that follows the row's largest weight; `alpt` learns a
step for each row by the gradient of LSQ (Esser et al., ICLR 2020, https://arxiv.org/abs/1902.08153).

How they are held. FBGEMM's own INT8 rows cannot be trained here: its CPU kernels look them up, but have no backward
pass for them (nor any for BF16), and TorchRec's collections before sharding are `nn.EmbeddingBag`s, whose weights
must be floats. So integers lie in the bits of float32 cells of an ordinary table (`integer_cells`), one cell of
which is the step: TorchRec shards, plans, exchanges and checkpoints them, table-wise or row-wise. A fused optimizer
cannot update them, as gradients are wider than stored rows. Their own route does so between two steps, on the
rank that holds a row, with the learning rate and the state of the fused optimizer that the table was given:
`sgd` and `rowwise_adagrad`, whose state is a number a row. Ranks tell each other all gradients of a step for that,
where TorchRec would send each to one rank.

Refused by name: shards of columns, data-parallel tables, rows behind a cache, the dense mode and optimizers that keep
more than a number a row (or all would be floats again), weight decay (it multiplies stored cells), compiled
training steps, and tables whose `data_type` is not FP32.

Where we depart. The paper runs the network a second time, with the updated weights, for the gradients of steps;
here the first pass's gradients serve, so that a step costs one. Its steps all start at one number, ours at what a
row's first weights need, and their rate is a share of the row's own rather than a rate for all. Public code rounds
all rows of `int8` by one step of 0.01, which `step=0.01` repeats; by default a row's step follows its largest weight.
An embedding-wide table of 16 bits is as long as one of FP16, but keeps small updates on average, which FBGEMM's FP16
rows on a CPU, rounded to the nearest, lose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType
from typing_extensions import Self, override

from embcomp.backends.base import Backend, BackendConfig, MethodState, StageInputs
from embcomp.backends.full import FullRoute, RangeCheck
from embcomp.backends.integer_rows.integer_cells import Bits, IntegerInit, cells_of, nearest
from embcomp.backends.integer_rows.integer_route import IntegerRoute, IntegerTable, IntegerWeights
from embcomp.backends.integer_rows.integer_updates import UpdateRule
from embcomp.errors import ConfigError
from embcomp.io.constraints import Positive
from embcomp.layers.row_sources import ComputedRows, RowSource
from embcomp.tables.footprint import Footprint, vector_footprint
from embcomp.tables.specs import LookupKey, PhysicalTable, TableSpec, UniformInit


@dataclass(frozen=True, kw_only=True)
class IntegerRows(BackendConfig):
    """What `int8`, `int16` and `alpt` share. Ids must lie in `[0, num_embeddings)`.

    Args:
        seed: salts the draws of stochastic rounding.
        trains: whether rows still learn; without, nothing is kept that serving does not need.
    """

    seed: int = 2021
    trains: bool = True

    approximates: ClassVar[bool] = True

    @property
    def width(self) -> Bits:
        """Bits of a stored weight."""
        raise NotImplementedError

    @property
    def first_step(self) -> float | None:
        """The step that all rows have at first; None for one of each row's own."""
        return None

    @property
    def rule(self) -> UpdateRule:
        """How rows take updates in."""
        raise NotImplementedError

    @property
    @override
    def is_serving_form(self) -> bool:
        return not self.trains

    @override
    def keeps_full(self, table: TableSpec) -> bool:
        return cells_of(table.embedding_dim, self.width) + 1 >= table.embedding_dim

    @override
    def physical_tables(self, tables: Sequence[TableSpec]) -> list[PhysicalTable]:
        return [
            PhysicalTable(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=cells_of(table.embedding_dim, self.width) + 1,
                lookups=tuple(LookupKey(table.name, feature) for feature in table.feature_names),
                init_fn=IntegerInit(
                    draw=table.init_fn or UniformInit(*table.init_bounds),
                    dim=table.embedding_dim,
                    bits=self.width,
                    step=self.first_step,
                ),
                is_packed=True,
            )
            for table in map(self._checked, tables)
        ]

    def _checked(self, table: TableSpec) -> TableSpec:
        if table.data_type is not DataType.FP32:
            raise ConfigError(
                f"{self.name}: table {table.name!r} has data_type {table.data_type}; integers lie in the bits of "
                "FP32 cells, so leave the data_type as FP32: rows take no more bytes by it"
            )
        return table

    @override
    def build(self, tables: Sequence[TableSpec]) -> Backend:
        physical = self.physical_tables(tables)
        keys = [key for table in physical for key in table.keys]
        own = [
            IntegerTable(
                name=table.name, dim=table.embedding_dim, num_features=len(table.feature_names)
            )
            for table in tables
        ]
        check = RangeCheck(tables)
        route: nn.Module = FullRoute(keys, check)
        combine = IntegerWeights(own, self.width, None)
        if self.trains:
            route = IntegerRoute(self.name, keys, check, own, rule=self.rule, seed=self.seed)
            combine = IntegerWeights(own, self.width, route)
        return Backend(
            physical_tables=physical,
            keys=keys,
            route=route,
            combine=combine,
            needs_unpooled_rows=True,
            needs_context=self.trains,
        )

    @override
    def dense_footprint(self, tables: Sequence[TableSpec]) -> Footprint:
        if not self.trains:
            return Footprint()
        return Footprint(
            tuple(
                vector_footprint(f"{table.name}.updates", "remap", 1, itemsize=8)
                for table in tables
            )
        )

    @override
    def compact(self, tables: Sequence[TableSpec], form: MethodState) -> MethodState:
        """The same rows, which learn no more."""
        return replace(form, config=replace(self, trains=False)) if self.trains else form

    @override
    def approximate(self, tables: Sequence[TableSpec], past: StageInputs) -> MethodState:
        rows: Mapping[str, Tensor | RowSource] = {
            f"rows.{table.name}": self._rounded(table, past.before.rows(table.name))
            for table in tables
        }
        return MethodState.of(replace(self, trains=False), rows)

    def _rounded(self, table: TableSpec, rows: RowSource) -> RowSource:
        """(N, cells + 1) of (N, D) rows, to the nearest integers."""

        def read(start: int, stop: int) -> Tensor:
            return nearest(rows.read(start, stop).float(), self.width, self.first_step)

        columns = cells_of(table.embedding_dim, self.width) + 1
        return ComputedRows((len(rows), columns), torch.float32, read, of=[rows])

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        whole = self.smallest(tables)
        return whole if whole.footprint(tables).serve_bytes <= budget else None

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self.with_size()


@dataclass(frozen=True, kw_only=True)
class Int8(IntegerRows):
    """Weights of 8 bits.

    Args:
        step: of all rows; by default a row's step follows its largest weight.
        seed: salts the draws of stochastic rounding.
        trains: whether rows still learn; without, nothing is kept that serving does not need.
    """

    step: Annotated[float | None, Positive()] = None

    name: ClassVar[str] = "int8"

    @property
    @override
    def width(self) -> Bits:
        return 8

    @property
    @override
    def first_step(self) -> float | None:
        return self.step

    @property
    @override
    def rule(self) -> UpdateRule:
        return UpdateRule(bits=self.width, steps="range" if self.step is None else "fixed")


@dataclass(frozen=True, kw_only=True)
class Int16(Int8):
    """Weights of 16 bits.

    Args:
        step: of all rows; by default a row's step follows its largest weight.
        seed: salts the draws of stochastic rounding.
        trains: whether rows still learn; without, nothing is kept that serving does not need.
    """

    name: ClassVar[str] = "int16"

    @property
    @override
    def width(self) -> Bits:
        return 16


@dataclass(frozen=True, kw_only=True)
class ALPT(IntegerRows):
    """Weights of 8 or 16 bits, whose steps are learnt row by row.

    Args:
        bits: 8 or 16; a budget takes what fits.
        step_rate: learning rate of steps, as a share of the row's own.
        seed: salts the draws of stochastic rounding.
        trains: whether rows still learn; without, nothing is kept that serving does not need.
    """

    bits: Literal[8, 16] | None = None
    step_rate: Annotated[float, Positive()] = 0.02

    name: ClassVar[str] = "alpt"
    size_fields: ClassVar[tuple[str, ...]] = ("bits",)

    @property
    @override
    def width(self) -> Bits:
        return 16 if self.bits == 16 else 8

    @property
    @override
    def rule(self) -> UpdateRule:
        return UpdateRule(bits=self.width, steps="learnt", step_rate=self.step_rate)

    @override
    def largest_within(self, tables: Sequence[TableSpec], budget: int) -> Self | None:
        for bits in (16, 8):
            found = self.with_size(bits=bits)
            if found.footprint(tables).serve_bytes <= budget:
                return found
        return None

    @override
    def smallest(self, tables: Sequence[TableSpec]) -> Self:
        return self.with_size(bits=8)
