"""What a training config's tables will cost, before anything is allocated or any data is read.

Only the names and cardinalities of the categorical features are needed: from the prepared dataset,
or from a small YAML when there is none yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from embcomp.backends.base import BackendConfig, full_table
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.plan import Plan, ResolvedPlan
from embcomp.collection.table_row_types import FP32, RowTypes, is_final
from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.integrity import open_dataset
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import listed, read_yaml
from embcomp.planning.stage_order import forms_by_stage, staged_groups
from embcomp.tables.footprint import Footprint, RowOptimizer, footprint_of
from embcomp.tables.specs import TableSpec, specs_from_configs

ROLES_OF_WEIGHTS = ("weights", "projection", "codebook")


@dataclass(frozen=True, kw_only=True)
class TableSize:
    """A categorical feature: all that a plan needs to know of the data.

    Args:
        name: the feature, and its table.
        hashed: whether ids are hashes of values, so that no table has a row for each.
        num_embeddings: ids run over `[0, num_embeddings)`.
        mean_length: mean number of values in a row.
        multi_valued: whether a row may have any number of values; by default where they are not
            one on average.
    """

    name: str
    num_embeddings: int
    mean_length: float = 1.0
    multi_valued: bool | None = None
    hashed: bool = False

    @property
    def has_bags(self) -> bool:
        """Whether rows may have any number of values."""
        return self.mean_length != 1 if self.multi_valued is None else self.multi_valued


def sizes_of_dataset(folder: str | Path) -> list[TableSize]:
    """The categorical features of a prepared dataset."""
    return sizes_of(open_dataset(folder))


def sizes_of(info: DatasetInfo) -> list[TableSize]:
    """The categorical features of a dataset whose description is read."""
    return [
        TableSize(
            name=feature.name,
            num_embeddings=feature.num_embeddings,
            mean_length=feature.mean_length,
            multi_valued=feature.multi_valued,
            hashed=feature.is_hashed,
        )
        for feature in info.categorical
    ]


def read_sizes(path: str | Path) -> list[TableSize]:
    """A YAML of `name: num_embeddings`, or `name: {num_embeddings: 10, mean_length: 2.5}`.

    Raises:
        ConfigError: for anything else, with the table's name.
    """
    known = ("num_embeddings", "mean_length")
    sizes = []
    for name, value in read_yaml(Path(path)).items():
        entry = value if isinstance(value, dict) else {"num_embeddings": value}
        unknown = [key for key in entry if key not in known]
        if unknown or "num_embeddings" not in entry:
            got = f"unknown key {unknown[0]!r}" if unknown else "num_embeddings is missing"
            raise ConfigError(f"{path}: table {name!r}: {got}; the keys are {listed(known)}")
        rows, length = entry["num_embeddings"], entry.get("mean_length", 1.0)
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ConfigError(
                f"{path}: table {name!r}: num_embeddings must be a positive integer, got {rows!r}"
            )
        if isinstance(length, bool) or not isinstance(length, int | float) or length <= 0:
            raise ConfigError(
                f"{path}: table {name!r}: mean_length must be a positive number, got {length!r}"
            )
        sizes.append(TableSize(name=str(name), num_embeddings=rows, mean_length=float(length)))
    if not sizes:
        raise ConfigError(f"{path}: expected at least one 'name: num_embeddings', got none")
    return sizes


@dataclass(frozen=True, kw_only=True)
class TableBytes:
    """Bytes of one table, or of several that share their storage.

    Args:
        tables: the logical tables.
        method: the method's name in configs.
        stored_rows: physical rows.
        stored_dim: physical width, or widths joined by `+`.
        weights: serving bytes of rows, projections and codebooks.
        indices: serving bytes of codes, remaps and masks.
        optimizer: bytes of the row optimizer's state.
        train: bytes that training keeps, in the stage that keeps most.
        serve: bytes of the serving form.
        full: bytes of the uncompressed tables.
        learnt: whether training finds the size, or another form that narrow row types shrink, so
            that the serving bytes are an upper bound.
    """

    tables: tuple[TableSpec, ...]
    method: str
    stored_rows: int
    stored_dim: str
    weights: int
    indices: int
    optimizer: int
    train: int
    serve: int
    full: int
    learnt: bool = False

    @property
    def rows(self) -> int:
        """Logical rows."""
        return sum(table.num_embeddings for table in self.tables)

    @property
    def compression(self) -> float:
        """Full bytes over serving bytes; infinite for tables of which nothing is stored."""
        return self.full / self.serve if self.serve else math.inf


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """What a stage of a run keeps of the embedding tables.

    Attributes:
        name: the stage.
        forms: the methods that hold the tables in it, as far as is known, and which.
        train: bytes that training keeps.
    """

    name: str
    forms: Sequence[tuple[str, tuple[TableSpec, ...]]]
    train: int


@dataclass(frozen=True, kw_only=True)
class ConfigPlan:
    """A config's tables with every size fixed.

    Args:
        main: the embedding tables; None when the model has none.
        first_order: tables of first-order weights; None when the model has none.
        optimizer: the row optimizer.
        dense_rows: whether each rank holds whole tables, trained by an ordinary optimizer.
        sizes: the features.
        row_types: the types that rows are served in.
    """

    main: ResolvedPlan | None
    first_order: ResolvedPlan | None
    optimizer: RowOptimizer
    dense_rows: bool
    sizes: Sequence[TableSize]
    row_types: RowTypes = FP32

    def lines(self) -> list[TableBytes]:
        """The embedding tables, in order of their first table."""
        return plan_lines(self.main, self.optimizer, self.row_types) if self.main else []

    def first_order_lines(self) -> list[TableBytes]:
        """Tables of first-order weights."""
        plan = self.first_order
        return plan_lines(plan, self.optimizer, self.row_types) if plan else []

    @property
    def replicated_bytes(self) -> int:
        """Bytes on every rank in dense mode: weights, their gradient and the optimizer's state."""
        stages = [sum((p.footprint for p in plans), Footprint()) for plans in self._stages()]
        return max(2 * f.train_weight_bytes + f.optimizer_bytes(self.optimizer) for f in stages)

    def on_meta(self) -> list[nn.ModuleDict]:
        """The collections without storage, as the planner wants them: once for each form.

        A method in stages holds its tables in several forms, and each must find its place.
        """
        return [
            nn.ModuleDict({str(i): _on_meta(plan) for i, plan in enumerate(plans)})
            for plans in self._stages()
        ]

    def stage_names(self) -> list[str]:
        """For each form of `on_meta`, the methods that hold the embedding tables in it."""
        if self.main is None:
            return [""]
        return [
            ", ".join(sorted({method.name for method, _ in plan.groups}))
            for plan in training_plans(self.main)
        ]

    def pooling_factors(self) -> dict[str, float]:
        """Mean bag length for each physical look-up."""
        lengths = {size.name: size.mean_length for size in self.sizes}
        factors: dict[str, float] = {}
        for plan in self._plans():
            for method, group in plan.groups:
                for form in method.training_forms(group):
                    for table in form.physical_tables(group):
                        factors |= {
                            str(key): lengths.get(key.feature, 1.0) for key in table.lookups
                        }
        return factors

    def stage_lines(self) -> list[StageBytes]:
        """What each stage that trains keeps; empty where no two methods are trained in stages."""
        if self.main is None or len(staged_groups(self.main)) < 2:
            return []
        return [
            StageBytes(
                name=name,
                forms=[(form.name, tuple(tables)) for form, tables in plan.groups],
                train=plan.footprint.train_bytes(self.optimizer),
            )
            for name, plan in forms_by_stage(self.main)
        ]

    def _plans(self) -> list[ResolvedPlan]:
        return [plan for plan in (self.main, self.first_order) if plan is not None]

    def _stages(self) -> list[list[ResolvedPlan]]:
        """All tables as they are held from stage to stage."""
        first_order = [] if self.first_order is None else [self.first_order]
        main = [] if self.main is None else training_plans(self.main)
        return [[plan, *first_order] for plan in main] or [first_order]


def plan_config(
    config: TrainConfig, sizes: Sequence[TableSize], forms: ResolvedPlan | None = None
) -> ConfigPlan:
    """Sizes the tables of a config.

    Args:
        config: the run.
        sizes: the features.
        forms: how the embedding tables are stored, where training has found that already.

    Raises:
        ConfigError: for an override, or a row type, of a feature that does not exist.
        BudgetError: for a budget that cannot be met; the text names the floor.
    """
    row_types = RowTypes.of(config.tables.row_types)
    row_types.check([size.name for size in sizes], "tables.row_types")
    rows = config.train.row_optimizer
    return ConfigPlan(
        main=forms or main_plan(config, sizes),
        first_order=first_order_plan(config, sizes),
        optimizer=rows.name,
        dense_rows=rows.mode == "dense" or config.train.sharding == "data_parallel",
        sizes=sizes,
        row_types=row_types,
    )


def config_to_plan(config: TrainConfig) -> Plan:
    """The plan that a config's `tables` section describes."""
    return Plan(
        default=config.tables.method.settings,
        overrides={name: choice.settings for name, choice in config.tables.overrides.items()},
        budget=config.tables.budget,
    )


def main_plan(config: TrainConfig, sizes: Sequence[TableSize]) -> ResolvedPlan | None:
    """The method of every embedding table, all sizes fixed; None for a model without tables."""
    if not config.model.settings.uses_embeddings:
        return None
    _check_hashed("tables.method", config_to_plan(config), sizes)
    return config_to_plan(config).resolve(table_specs(config, sizes))


def first_order_plan(config: TrainConfig, sizes: Sequence[TableSize]) -> ResolvedPlan | None:
    """The method of the first-order weights, sizes fixed; None for a model without any."""
    if not config.model.settings.uses_first_order:
        return None
    plan = Plan(default=config.tables.first_order.settings)
    _check_hashed("tables.first_order", plan, sizes)
    return plan.resolve(table_specs(config, sizes, embedding_dim=1))


def _check_hashed(key: str, plan: Plan, sizes: Sequence[TableSize]) -> None:
    """Raise a ConfigError where a method would store what belongs to each id of hashed values."""
    for size in sizes:
        method = plan.overrides.get(size.name, plan.default)
        if size.hashed and not method.hashes_ids:
            raise ConfigError(
                f"{key}: the ids of {size.name!r} are hashes of its values (encode: hash), and {method.name} "
                f"would keep something for each of {size.num_embeddings:,}; hold it by hash or unified, "
                "with num_buckets or a budget in bytes"
            )


def table_configs(
    config: TrainConfig, sizes: Sequence[TableSize], *, embedding_dim: int | None = None
) -> list[EmbeddingBagConfig]:
    """The tables of a config, one for each feature: what is planned, searched and trained alike."""
    bags = PoolingType.MEAN if config.tables.pooling == "mean" else PoolingType.SUM
    return [
        EmbeddingBagConfig(
            name=size.name,
            feature_names=[size.name],
            num_embeddings=size.num_embeddings,
            embedding_dim=embedding_dim or config.tables.embedding_dim,
            # A bag of one is its own sum, and a sum needs no division by lengths.
            pooling=bags if size.has_bags else PoolingType.SUM,
        )
        for size in sizes
    ]


def table_specs(
    config: TrainConfig, sizes: Sequence[TableSize], *, embedding_dim: int | None = None
) -> list[TableSpec]:
    """The tables of a config as methods are told of them."""
    return specs_from_configs(table_configs(config, sizes, embedding_dim=embedding_dim))


def plan_lines(
    plan: ResolvedPlan, optimizer: RowOptimizer, row_types: RowTypes = FP32
) -> list[TableBytes]:
    """One line for each table, or for each set of tables that share their storage."""
    lines = []
    for config, group in plan.groups:
        together = config.stores_together(group)
        for tables in [tuple(group)] if together else [(table,) for table in group]:
            lines.append(_line(config, tables, optimizer, row_types))
    order = {table.name: index for index, table in enumerate(plan.tables)}
    return sorted(lines, key=lambda line: order[line.tables[0].name])


def total_line(lines: Sequence[TableBytes]) -> TableBytes:
    """The sum of lines."""
    return TableBytes(
        tables=tuple(table for line in lines for table in line.tables),
        method="",
        stored_rows=sum(line.stored_rows for line in lines),
        stored_dim="",
        weights=sum(line.weights for line in lines),
        indices=sum(line.indices for line in lines),
        optimizer=sum(line.optimizer for line in lines),
        train=sum(line.train for line in lines),
        serve=sum(line.serve for line in lines),
        full=sum(line.full for line in lines),
        learnt=any(line.learnt for line in lines),
    )


def _line(
    config: BackendConfig,
    tables: tuple[TableSpec, ...],
    optimizer: RowOptimizer,
    row_types: RowTypes,
) -> TableBytes:
    config = config.for_tables(tables)
    footprint = row_types.footprint(config, tables)
    narrow = any(row_types.of_table(table.name) != "fp32" for table in tables)
    stored = [tensor for tensor in footprint.tensors if tensor.lookup]
    return TableBytes(
        tables=tables,
        method=config.name,
        stored_rows=sum(tensor.rows for tensor in stored),
        stored_dim="+".join(str(dim) for dim in sorted({tensor.columns for tensor in stored})),
        weights=_serve_bytes(footprint, weights=True),
        indices=_serve_bytes(footprint, weights=False),
        optimizer=footprint.optimizer_bytes(optimizer),
        train=most_train_bytes(config, tables, optimizer),
        serve=footprint.serve_bytes,
        full=sum(table.full_bytes for table in tables),
        learnt=config.learns_size or (narrow and not is_final(config)),
    )


def _serve_bytes(footprint: Footprint, *, weights: bool) -> int:
    return sum(
        tensor.serve_bytes
        for tensor in footprint.tensors
        if (tensor.role in ROLES_OF_WEIGHTS) == weights
    )


def most_train_bytes(
    config: BackendConfig,
    tables: Sequence[TableSpec],
    optimizer: RowOptimizer,
    *,
    dense_rows: bool = False,
) -> int:
    """Bytes that training keeps for some tables of a method, in the form that takes most.

    Args:
        config: the method.
        tables: all that it holds, those that stay full included.
        optimizer: of the rows.
        dense_rows: whether rows have a gradient as large as they are.
    """

    def size(footprint: Footprint) -> int:
        gradient = footprint.train_weight_bytes if dense_rows else 0
        return gradient + footprint.train_bytes(optimizer)

    small = [table for table in tables if not config.keeps_full(table)]
    kept = footprint_of(full_table(table) for table in tables if config.keeps_full(table))
    forms = config.training_forms(small) if small else ()
    return size(kept) + max((size(form.footprint(small)) for form in forms), default=0)


def training_plans(plan: ResolvedPlan) -> list[ResolvedPlan]:
    """How tables are stored from stage to stage; methods of fewer forms stay in their last."""
    if len(staged_groups(plan)) > 1:
        return [stored for _, stored in forms_by_stage(plan)]
    forms = [(config.training_forms(group), group) for config, group in plan.groups]
    return [
        ResolvedPlan(
            plan.tables,
            {table.name: own[min(stage, len(own) - 1)] for own, group in forms for table in group},
        )
        for stage in range(max(len(own) for own, _ in forms))
    ]


def _on_meta(plan: ResolvedPlan) -> CompressedEmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(
            name=table.name,
            feature_names=list(table.feature_names),
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            pooling=PoolingType.MEAN if table.mean_pooling else PoolingType.SUM,
        )
        for table in plan.tables
    ]
    return CompressedEmbeddingBagCollection(configs, plan, device=torch.device("meta"))
