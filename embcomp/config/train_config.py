"""The YAML of a training run, one to one as pydantic models; every key is checked before anything starts.

`tables.method` and `model` name an entry of `embcomp.backends.BACKENDS` and `embcomp.models.MODELS`;
their remaining keys are the fields of that dataclass, so a new method or model needs no line here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from embcomp.config.sections import (
    Bytes,
    FolderName,
    MethodConfig,
    ModelChoice,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    YamlConfig,
)
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import (
    config_error,
    did_you_mean,
    listed,
)
from embcomp.tables.budget import (
    SHARD_CODES_ABOVE,
    format_bytes,
    parse_budget,
    why_unreadable,
)

if TYPE_CHECKING:
    from embcomp.backends.base import BackendConfig

MOST_EPOCHS = 10**6
LEAST_HANDOVER_MEMORY = 64 << 20
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running mean: at 1 it would never move
Epsilon = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=0, le=1000)]
Width = Annotated[int, Field(gt=0, le=2**16)]
Monitor = Literal["auc", "gauc", "log_loss", "weighted_auc", "weighted_gauc", "weighted_log_loss"]
"""Metrics that can be told to choose; the weighted ones need a dataset whose rows have weights."""
BatchSize = Annotated[int, Field(gt=0, le=2**30)]  # offsets of a batch are 32-bit integers


def is_loss(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.endswith("log_loss")


class DataConfig(Section):
    """Which dataset, and how it is cut into batches.

    Attributes:
        path: the folder that holds `dataset.json`.
        batch_size: rows per training step over all ranks together.
        eval_batch_size: rows per evaluation step over all ranks together.
        shuffle: whether the training rows are shuffled in each epoch.
        shuffle_buffer: rows of all ranks that are shuffled together; None leaves the loader's default.
        drop_last: whether an epoch's last, smaller training batch is left out.
        search_share: share of the training rows, the last ones, that methods which choose their
            structure on data they do not train on keep for it: the search-validation rows.
    """

    path: str
    batch_size: BatchSize = 4096
    eval_batch_size: BatchSize = 16384
    shuffle: bool = True
    shuffle_buffer: BatchSize | None = None
    drop_last: bool = False
    search_share: Annotated[float, Field(gt=0, lt=1)] = 0.1


class InitConfig(Section):
    """Initial rows: the method's own rule, or one distribution for every physical table.

    Attributes:
        name: `default` (the method's rule), `normal` or `uniform` (around zero).
        scale: standard deviation of `normal`, bound of `uniform`.
    """

    name: Literal["default", "normal", "uniform"] = "default"
    scale: PositiveFloat | None = None

    @model_validator(mode="after")
    def _scale_fits(self) -> InitConfig:
        if (self.name == "default") != (self.scale is None):
            takes = "takes no scale" if self.name == "default" else "needs a scale"
            raise config_error(f"init {self.name!r} {takes}, got scale={self.scale}")
        return self


class TablesConfig(Section):
    """The embedding tables.

    Attributes:
        embedding_dim: width of an embedding as the model sees it.
        method: how tables are stored unless `overrides` says otherwise.
        budget: serving bytes of all tables: a number, `64MiB`, or `10%` of the full tables.
        overrides: feature name to its own method.
        first_order: how first-order weights are stored, for models that use them.
        pooling: how the values of a multi-valued feature become one vector.
        init: initial rows.
        row_types: what type rows are served in: `fp32`, `fp16`, `int8` or `int4`, or a mapping from
            table to type with a `default`. Training is not changed by it; the final metrics, the
            reported bytes and `embcomp export` are those of such rows.
    """

    embedding_dim: Width = 16
    method: MethodConfig
    budget: Bytes | None = None
    overrides: dict[str, MethodConfig] = Field(default_factory=dict)
    first_order: MethodConfig = Field(default_factory=lambda: MethodConfig.model_validate("full"))
    pooling: Literal["sum", "mean"] = "mean"
    init: InitConfig = InitConfig()
    row_types: dict[str, str] = Field(default_factory=dict)

    @field_validator("row_types", mode="before")
    @classmethod
    def _row_types_exist(cls, wanted: Any) -> Any:
        if isinstance(wanted, str):
            wanted = {"default": wanted}
        if not isinstance(wanted, Mapping):
            raise config_error(f"expected a type, or a mapping from table to type; got {wanted!r}")
        if wanted:
            from embcomp.tables.row_types import check_row_type

            for type_ in wanted.values():
                try:
                    check_row_type(type_)
                except ConfigError as error:
                    raise config_error(str(error)) from None
        return dict(wanted)

    @model_validator(mode="before")
    @classmethod
    def _budget_sizes_the_method(cls, value: Any) -> Any:
        """Hand the budget to the method, which must know where its size comes from."""
        if not isinstance(value, Mapping) or value.get("budget") is None or "method" not in value:
            return value
        method = value["method"]
        options = {"name": method} if isinstance(method, str) else method
        name = options.get("name") if isinstance(options, Mapping) else None
        if not isinstance(name, str) or name not in MethodConfig.registry():
            return value  # the method's own check says what is wrong
        if why_unreadable(value["budget"]):
            return value  # the budget's own check says so, once
        sizes = MethodConfig.registry()[name].size_fields
        for key in (*sizes, "budget"):
            if options.get(key) is not None:
                raise config_error(f"give either budget or method.{key}; both would fix the size")
        return {**value, "method": {**options, "budget": value["budget"]}}

    @model_serializer(mode="wrap")
    def _budget_once(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain_self = handler(self)
        if self.budget is not None:
            del plain_self["method"]["budget"]
        return plain_self


_RMSPROP_ONLY = ("ar_alpha", "ema_beta", "min_shrinkage")


class RowOptimizerConfig(Section):
    """What updates embedding rows.

    Attributes:
        name: `adam` is fused on CUDA only; elsewhere it needs `mode: dense`. `rowwise_rmsprop_ar` is
            fused only, and needs fbgemm 1.9.
        learning_rate: learning rate of the rows.
        mode: `fused` updates touched rows inside the backward pass; `dense` is an ordinary torch
            optimizer over whole tables (small tables only), as published baselines are trained.
        eps: added to the denominator of Adagrad, RMSprop and Adam.
        betas: Adam's.
        weight_decay: decoupled decay, lazy for fused rows: equal to decaying every row in every step.
        l2: `0.5 * l2 * ||E||^2` over whole tables is added to the loss (dense mode only).
        max_gradient: bound on each element of a row's gradient (fused mode only).
        ar_alpha: by which a row decays for every step since its last update, as a share of the learning rate
            (`rowwise_rmsprop_ar` only, as the next two).
        ema_beta: decay of its running mean of squared gradients.
        min_shrinkage: what a row is at least multiplied by, however long it rested.
    """

    name: Literal["sgd", "rowwise_adagrad", "rowwise_rmsprop_ar", "adagrad", "adam"] = (
        "rowwise_adagrad"
    )
    learning_rate: PositiveFloat = 0.05
    mode: Literal["fused", "dense"] = "fused"
    eps: Epsilon = 1e-8
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: Penalty = 0.0
    l2: Penalty = 0.0
    max_gradient: PositiveFloat | None = None
    ar_alpha: Penalty = 0.0
    ema_beta: Decay = 0.99
    min_shrinkage: Annotated[float, Field(ge=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _rmsprop_fits(self) -> RowOptimizerConfig:
        if self.name == "rowwise_rmsprop_ar":
            if self.mode == "dense":
                raise config_error(
                    "rowwise_rmsprop_ar needs mode: fused, as whole tables do not tell which rows were looked up; "
                    "mode: dense takes sgd, rowwise_adagrad, adagrad or adam"
                )
            return self
        foreign = [name for name in _RMSPROP_ONLY if name in self.model_fields_set]
        if foreign:
            raise config_error(
                f"{listed(foreign)} {'belongs' if len(foreign) == 1 else 'belong'} to name: "
                f"rowwise_rmsprop_ar, not to {self.name}"
            )
        return self

    @model_serializer(mode="wrap")
    def _own_settings(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own: dict[str, Any] = handler(self)
        if self.name != "rowwise_rmsprop_ar":
            for name in _RMSPROP_ONLY:
                own.pop(name, None)
        return own

    @model_validator(mode="after")
    def _mode_fits(self) -> RowOptimizerConfig:
        if self.mode == "fused" and self.l2:
            raise config_error(
                "l2 acts on whole tables and needs mode: dense; fused rows take weight_decay instead"
            )
        if self.mode == "dense" and self.max_gradient is not None:
            raise config_error(
                "max_gradient belongs to mode: fused; dense rows are clipped by clip_norm"
            )
        if self.learning_rate * self.weight_decay >= 1:
            raise config_error(
                "learning_rate * weight_decay must be below 1, else a step flips every row"
            )
        return self


class DenseOptimizerConfig(Section):
    """The optimizer of everything that is not a row."""

    name: Literal["adam", "adamw", "adagrad", "sgd"] = "adam"
    learning_rate: PositiveFloat = 0.001
    eps: Epsilon = 1e-8
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    momentum: Decay = 0.0
    weight_decay: Penalty = 0.0


class PlateauConfig(Section):
    """Both learning rates are multiplied by `factor` whenever an evaluation brings no improvement."""

    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    min_learning_rate: NonNegativeFloat = 1e-6


class EarlyStopConfig(Section):
    """Training ends after `patience` evaluations in a row without an improvement."""

    patience: PositiveInt = 2


class StageConfig(Section):
    """What differs from a method's own idea of one of its stages.

    Attributes:
        epochs: passes over the stage's training rows; 0 only hands over.
        max_steps: stop after this many steps.
        learning_rate: factor on the learning rates of rows and network.
    """

    epochs: Annotated[int, Field(ge=0, le=MOST_EPOCHS)] | None = None
    max_steps: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None


class RunConfig(Section):
    """The loop.

    Attributes:
        epochs: passes over the training split.
        max_steps: stop after this many steps, whatever the epochs say.
        row_optimizer: what updates embedding rows.
        dense_optimizer: what updates everything else.
        clip_norm: bound on the gradients' norm; rows take part in dense mode only.
        warmup_steps: steps over which both learning rates grow linearly from zero.
        plateau: reduce the learning rates when the monitored metric stalls.
        early_stop: end the training when the monitored metric stalls.
        monitor: the validation metric that decides what is best; `weighted_auc` and its like go by
            the weights of rows.
        min_delta: by how much it must improve to count.
        eval_every: steps between evaluations; None evaluates at the end of each epoch.
        checkpoint_every: steps between checkpoints, besides the one after each evaluation.
        keep_checkpoints: how many of the latest checkpoints stay, besides the best.
        log_every: steps between two records of the training loss.
        device: `auto` takes CUDA when there is one.
        precision: `bf16` runs the dense part under autocast, on CUDA and on CPUs that have bfloat16.
        sharding: how tables are spread over ranks; `auto` asks TorchRec's planner.
        rank_timeout: seconds without a sign of life after which a rank counts as dead.
        stages: for methods that are trained in stages: stage name to what differs in it. Where several
            are, the first stage's name is those of the methods' first stages (`dense+supernet`), and
            later ones begin with their method's (`pq.codes`).
        start_from: folder of a finished run whose best weights stand for the first stage, which is
            then not trained. Its tables must be stored as that stage stores them.
        warm_start: folder of a finished run on an earlier dataset of the same features. Rows begin
            as that run left them, by their raw values and whatever their numbers are now, network and
            optimizers too; of a method in stages the last one alone is trained, on the structure that
            was found then.
        shard_codes_above: bytes of a table's codes, bitmaps and pointers up to which every rank holds them;
            larger ones are sharded over the ranks. No result depends on it.
        handover_memory: what a rank may hold beside its shards while tables are handed from one stage
            to the next: a number of bytes, at least 64MiB. No result depends on it.
    """

    epochs: Annotated[int, Field(gt=0, le=MOST_EPOCHS)] = 1
    max_steps: PositiveInt | None = None
    row_optimizer: RowOptimizerConfig = RowOptimizerConfig()
    dense_optimizer: DenseOptimizerConfig = DenseOptimizerConfig()
    clip_norm: PositiveFloat | None = None
    warmup_steps: NonNegativeInt = 0
    plateau: PlateauConfig | None = None
    early_stop: EarlyStopConfig | None = None
    monitor: Monitor = "auc"
    min_delta: NonNegativeFloat = 1e-6
    eval_every: PositiveInt | None = None
    checkpoint_every: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 100
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    sharding: Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"] = "auto"
    rank_timeout: Annotated[float, Field(gt=0, le=10**6)] = 30.0
    stages: dict[str, StageConfig] = Field(default_factory=dict)
    start_from: str | None = None
    warm_start: str | None = None
    shard_codes_above: Bytes = SHARD_CODES_ABOVE
    handover_memory: Bytes = "256MiB"

    @field_validator("stages", mode="before")
    @classmethod
    def _joined_names(cls, value: object) -> object:
        """`{pq: {codes: {...}}}` as `{pq.codes: {...}}`: what a dotted override is read as."""
        if not isinstance(value, Mapping):
            return value
        found: dict[object, object] = {}
        for name, own in value.items():
            if (
                isinstance(own, Mapping)
                and own
                and all(isinstance(e, Mapping) for e in own.values())
            ):
                found |= {f"{name}.{stage}": each for stage, each in own.items()}
            else:
                found[name] = own
        return found

    @field_validator("shard_codes_above")
    @classmethod
    def _is_no_share(cls, value: int | str) -> int | str:
        if parse_budget(value) < 1:
            raise config_error(
                f"expected a number of bytes such as {SHARD_CODES_ABOVE!r}, or 1 to shard the codes of "
                f"every table; got {value!r}"
            )
        return value

    @field_validator("handover_memory")
    @classmethod
    def _holds_a_block(cls, value: int | str) -> int | str:
        if parse_budget(value) < LEAST_HANDOVER_MEMORY:
            raise config_error(
                f"expected a number of bytes, at least {format_bytes(LEAST_HANDOVER_MEMORY)}, which a "
                f"block of rows may take; got {value!r}"
            )
        return value

    @model_validator(mode="after")
    def _begins_once(self) -> RunConfig:
        if self.start_from is not None and self.warm_start is not None:
            raise config_error(
                "give either start_from or warm_start; both would say how rows begin"
            )
        return self

    @model_validator(mode="after")
    def _rows_can_be_placed(self) -> RunConfig:
        rows = self.row_optimizer
        if rows.mode == "dense" and self.sharding not in ("auto", "data_parallel"):
            raise config_error(
                f"sharding {self.sharding!r} does not go with row_optimizer.mode: dense, "
                "which keeps a copy of every table on each rank; use auto or data_parallel"
            )
        if self.sharding == "data_parallel" and rows.mode == "fused":
            if rows.name == "adam":
                raise config_error(
                    "data_parallel rows take no fused adam; use row_optimizer.mode: dense"
                )
            if rows.name == "rowwise_rmsprop_ar":
                raise config_error(
                    "data_parallel rows take no rowwise_rmsprop_ar, which is in fused kernels alone; use "
                    "another sharding, or rowwise_adagrad"
                )
            if rows.max_gradient is not None:
                raise config_error("data_parallel rows take no max_gradient; use another sharding")
        if self.sharding == "column_wise" and rows.name.startswith("rowwise_"):
            raise config_error(
                f"column_wise splits a row, and {rows.name} would then keep one state per piece, "
                "so that results depend on the number of ranks; use adagrad, sgd or another sharding"
            )
        return self


class TrainConfig(YamlConfig):
    """Everything that a training run depends on."""

    name: FolderName
    seed: Seed = 2021
    data: DataConfig
    tables: TablesConfig
    model: ModelChoice
    train: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _stages_exist(self) -> TrainConfig:
        if not self.train.stages:
            return self
        chosen = [self.tables.method, *self.tables.overrides.values()]
        methods = [each.settings for each in chosen]
        known = [stage.name for method in methods for stage in method.stages()]
        for name in self.train.stages:
            if name not in known and not _may_be_combined(name, methods):
                raise config_error(
                    f"train.stages: unknown stage {name!r}{did_you_mean(name, known)}; the stages "
                    f"of {self.tables.method.name} are {listed(dict.fromkeys(known))}"
                )
        return self

    @model_validator(mode="after")
    def _rows_stay_whole(self) -> TrainConfig:
        narrow = set(self.tables.row_types.values()) - {"fp32"}
        if narrow and self.train.sharding == "column_wise":
            raise config_error(
                "train.sharding: column_wise splits rows, and tables.row_types rounds whole ones; "
                "use auto, table_wise or row_wise"
            )
        return self

    def with_data(self, path: str | Path) -> TrainConfig:
        """The same config for a dataset that lies elsewhere."""
        return self.model_copy(update={"data": self.data.model_copy(update={"path": str(path)})})


def is_combined(name: str) -> bool:
    """Whether a stage's name is one of a run with several methods in stages: `a.b` or `a+b`."""
    return "." in name or "+" in name


def _may_be_combined(name: str, methods: Sequence[BackendConfig]) -> bool:
    """Whether a run may have such a stage; which ones it has is known once tables are."""
    owner, dot, stage = name.rpartition(".")
    own = [each for each in methods if each.name == owner.partition("@")[0]]
    if dot:
        return any(stage == each.name for method in own for each in method.stages())
    firsts = {method.stages()[0].name for method in methods}
    return "+" in name and firsts.issuperset(name.split("+"))


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read and check a training YAML.

    Args:
        path: the YAML file.
        overrides: `key.path=value` strings; a value is parsed as YAML.

    Raises:
        ConfigError: On any problem, with every problem found and the keys that are valid.
    """
    return TrainConfig.load(path, overrides)


def parse_config(
    raw: Mapping[str, Any], overrides: Iterable[str] = (), source: str = "config"
) -> TrainConfig:
    """Check a config that is already a mapping; see `load_config`."""
    return TrainConfig.parse(raw, overrides, source=source)
