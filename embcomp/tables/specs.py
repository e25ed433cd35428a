"""What a method is told about one logical table, and what it asks TorchRec to hold for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    PoolingType,
)

from embcomp.errors import ConfigError
from embcomp.tables.name_hash import name64
from embcomp.tables.row_formats import RowType
from embcomp.tables.torchrec_settings import check_settings, uniform_bounds

InitFn = Callable[[Tensor], Tensor | None]

_OTHER_TYPES = {
    # What would be trained: float16 before TorchRec shards it, and nothing afterwards.
    DataType.BF16: "FBGEMM looks up no BF16 rows in training, and TorchRec holds unsharded BF16 tables as FP16"
}
_ITEMSIZE = {DataType.FP32: 4, DataType.FP16: 2}


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One logical table, as its user declared it.

    Args:
        name: table name, unique in the collection.
        num_embeddings: ids run over `[0, num_embeddings)`.
        embedding_dim: width that the model sees.
        feature_names: features that are looked up here.
        index: position among the collection's tables, for lists that people read. Nothing that is
            stored may depend on it: a table is known by its name.
        mean_pooling: whether bags are averaged rather than summed.
        data_type: type in which rows are trained, FP32 or FP16.
        init_bounds: range of the uniform initialisation.
        init_fn: the user's own initialisation; None when it is the uniform one.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    feature_names: tuple[str, ...]
    index: int = 0
    mean_pooling: bool = False
    data_type: DataType = DataType.FP32
    init_bounds: tuple[float, float] = (-0.05, 0.05)
    init_fn: InitFn | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for key, value in (
            ("num_embeddings", self.num_embeddings),
            ("embedding_dim", self.embedding_dim),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"table {self.name!r}: {key} must be a positive int, got {value!r}"
                )
        if not self.feature_names:
            raise ConfigError(f"table {self.name!r} has no feature_names")
        if not self.name or "." in self.name:
            raise ConfigError(f"table name {self.name!r} must be non-empty and hold no '.'")
        if self.data_type not in _ITEMSIZE:
            raise ConfigError(
                f"table {self.name!r}: rows are trained in FP32 or FP16, got {self.data_type}; "
                f"{_OTHER_TYPES.get(self.data_type, 'lower precisions are for the exported artefact')}"
            )

    def without_repeats(self) -> TableSpec:
        """This table with each of its features once."""
        features = tuple(dict.fromkeys(self.feature_names))
        return self if features == self.feature_names else replace(self, feature_names=features)

    @property
    def itemsize(self) -> int:
        """Bytes of one trained weight."""
        return _ITEMSIZE[self.data_type]

    @property
    def full_bytes(self) -> int:
        """What the uncompressed table takes when served."""
        return self.num_embeddings * self.embedding_dim * self.itemsize

    @property
    def init_std(self) -> float:
        """Standard deviation of the uniform initialisation."""
        low, high = self.init_bounds
        return float((high - low) / 12**0.5)


def specs_from_configs(configs: Sequence[BaseEmbeddingConfig]) -> list[TableSpec]:
    """Read TorchRec's table configs (bag or not), leaving them as they are.

    Raises:
        ConfigError: for a duplicate or dotted name, no features, or sizes below one.
    """
    refuse_twice(config.name for config in configs)
    specs = [_spec(index, config) for index, config in enumerate(configs)]
    _refuse_keys_of_one_name(specs)
    return specs


def refuse_twice(names: Iterable[str]) -> None:
    """Raise a ConfigError for tables of one name: a table is known by it."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ConfigError(f"table names must be unique, got twice: {', '.join(twice)}")


def _refuse_keys_of_one_name(specs: Sequence[TableSpec]) -> None:
    """Table `a/b` with feature `c` would be looked up under the name of table `a` with `b/c`."""
    named: dict[str, LookupKey] = {}
    for key in (LookupKey(spec.name, feature) for spec in specs for feature in spec.feature_names):
        other = named.setdefault(str(key), key)
        if other != key:
            raise ConfigError(
                f"tables {other.table!r} and {key.table!r}: their features {other.feature!r} and "
                f"{key.feature!r} would be looked up under one name, {str(key)!r}; rename one of "
                "them without '/'"
            )


def by_name(tables: Iterable[TableSpec]) -> list[TableSpec]:
    """Tables in the order of their names: the one in which methods join what they learn of them."""
    return sorted(tables, key=lambda table: table.name)


def _spec(index: int, config: BaseEmbeddingConfig) -> TableSpec:
    pooling = config.pooling if isinstance(config, EmbeddingBagConfig) else PoolingType.SUM
    if pooling not in (PoolingType.SUM, PoolingType.MEAN):
        raise ConfigError(f"table {config.name!r}: pooling must be SUM or MEAN, got {pooling}")
    if config.num_embeddings < 1:  # before its initialisation bounds divide by it
        raise ConfigError(
            f"table {config.name!r}: num_embeddings must be a positive int, "
            f"got {config.num_embeddings!r}"
        )
    check_settings(config)
    bounds = uniform_bounds(config)
    return TableSpec(
        name=config.name,
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        feature_names=tuple(config.feature_names or [config.name]),
        index=index,
        mean_pooling=pooling is PoolingType.MEAN,
        data_type=config.data_type,
        init_bounds=bounds or (config.get_weight_init_min(), config.get_weight_init_max()),
        init_fn=config.init_fn if bounds is None else None,
    )


@dataclass(frozen=True)
class UniformInit:
    """Uniform initialisation with bounds that do not depend on the shard it is given."""

    low: float
    high: float

    def __call__(self, weight: Tensor) -> Tensor:
        """Fill the weight in place."""
        with torch.no_grad():
            return weight.uniform_(self.low, self.high)

    @classmethod
    def with_std(cls, std: float) -> UniformInit:
        """Zero mean and the given standard deviation."""
        return cls(-std * 3**0.5, std * 3**0.5)


@runtime_checkable
class DrawsWeights(Protocol):
    """An initialisation that stores the weights that it draws in another way."""

    def drawn_by(self, draw: InitFn) -> InitFn:
        """The same of weights of another distribution.

        Args:
            draw: fills weights.
        """


@dataclass(frozen=True)
class SkipEmptyShards:
    """A user's initialisation, kept from the empty shards that TorchRec hands to idle ranks."""

    init_fn: InitFn

    def __call__(self, weight: Tensor) -> Tensor | None:
        """Fill the weight in place, unless there is nothing to fill."""
        return self.init_fn(weight) if weight.numel() else weight


class LookupKey(NamedTuple):
    """One physical look-up: unique even where a feature is in several tables.

    Its `str()` is the name under which TorchRec looks it up, and part of every exported program;
    names of tables and features may hold any of its separators, so it is never taken apart again.

    Attributes:
        table: the logical table.
        feature: the feature that is looked up in it.
        part: which of the look-ups of that feature it is.
    """

    table: str
    feature: str
    part: int = 0

    def __str__(self) -> str:
        return f"{self.table}/{self.feature}#{self.part}"


@dataclass(frozen=True, kw_only=True)
class PhysicalTable:
    """A table that TorchRec holds, shards, plans and checkpoints for a method.

    Its bags are summed. The width is the true one: the collection pads it to what the fused
    kernels need, and cuts the padding off before a method sees the rows.

    Args:
        name: unique in the collection; part of every checkpoint.
        num_embeddings: rows.
        embedding_dim: true width.
        lookups: the look-ups made in it, unique in the collection.
        init_fn: initialisation of a shard of any shape.
        data_type: type of the weights.
        is_codebook: whether rows are codewords that many ids are made of.
        is_packed: whether rows are other numbers in the bits of float32 cells, which nothing may round, scale
            or train but the method itself.
        row_type: the type in which rows are served whatever is asked for; None where that is asked.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    lookups: tuple[LookupKey, ...]
    init_fn: InitFn
    data_type: DataType = DataType.FP32
    is_codebook: bool = False
    is_packed: bool = False
    row_type: RowType | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The look-ups by the names that TorchRec has for them."""
        return tuple(str(lookup) for lookup in self.lookups)

    @property
    def data_type_bytes(self) -> int:
        """Bytes of one weight."""
        return _ITEMSIZE[self.data_type]

    def drawn_by(self, draw: InitFn) -> InitFn:
        """The initialisation where weights have another distribution.

        Args:
            draw: fills weights.
        """
        return self.init_fn.drawn_by(draw) if isinstance(self.init_fn, DrawsWeights) else draw

    def config(self) -> EmbeddingBagConfig:
        """TorchRec's description of it, the width padded to the fused kernels' multiple of 4."""
        return EmbeddingBagConfig(
            name=self.name,
            num_embeddings=self.num_embeddings,
            embedding_dim=padded_dim(self.embedding_dim),
            feature_names=list(self.keys),
            pooling=PoolingType.SUM,
            data_type=self.data_type,
            init_fn=SkipEmptyShards(self.init_fn),
        )


def padded_dim(dim: int) -> int:
    """The width in which a row of `dim` weights is trained: FBGEMM wants multiples of 4."""
    return -(-dim // 4) * 4


def splits_by_rows(num_embeddings: int, ranks: int) -> bool:
    """Whether every rank gets rows of a table that is sharded by rows.

    Where one gets none, FBGEMM's backward pass on the CPU updates wrong rows of the tables beside
    it, and says nothing.
    """
    return -(-num_embeddings // ranks) * (ranks - 1) < num_embeddings


def shared_name(*settings: object) -> str:
    """What physical tables of many logical ones are called, before what each of them holds.

    It says nothing of the tables, which may come and go; methods with other settings beside each
    other get other names.

    Args:
        settings: what fixes the shape and meaning of the rows, whatever tables there are.
    """
    return f"shared_{name64(repr(settings)):016x}"[: len("shared_") + 8]
