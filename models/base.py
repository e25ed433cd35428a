"""What all models share: the description of their inputs and the interface of their settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
)

from embcomp.errors import ConfigError
from embcomp.io.constraints import Broken, Constrained
from embcomp.models.checks import (
    check_choice,
    check_feature_names,
    check_not_negative,
    check_positive,
    not_expected,
)
from embcomp.models.fields import POOLINGS, Pooling


@dataclass(frozen=True)
class ModelInputs:
    """What a model needs to know of the data and the tables.

    Attributes:
        feature_names: names of the F categorical features, in the order the model stacks them.
        embedding_dim: width D of every embedding that the tables return.
        num_dense: number I of numeric features; 0 when there are none.
        pooling: how bags are pooled when the tables return unpooled rows (a dict of JaggedTensor);
            tables that return a KeyedTensor have pooled already.
    """

    feature_names: tuple[str, ...]
    embedding_dim: int
    num_dense: int
    pooling: Pooling = "sum"

    def __post_init__(self) -> None:
        check_feature_names(self.feature_names)
        check_positive("embedding_dim", self.embedding_dim)
        check_not_negative("num_dense", self.num_dense)
        check_choice("pooling", self.pooling, POOLINGS)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Constrained, ABC):
    """Hyper-parameters of one model.

    Subclasses add fields, whose annotations say what they may be; what relates two fields they check
    in `__post_init__`.

    `uses_embeddings` and `uses_first_order` say which tables `build` wants, so that nobody
    allocates tables that the model would not look up.
    """

    uses_embeddings: ClassVar[bool] = True

    @classmethod
    def refusal(cls, broken: Broken) -> str:
        """The text of an error: the field with its value, and what would do."""
        return not_expected(broken)

    @property
    def uses_first_order(self) -> bool:
        """Whether the model takes tables of first-order weights (embedding_dim 1)."""
        return False

    def build(
        self, inputs: ModelInputs, tables: nn.Module | None, first_order: nn.Module | None
    ) -> nn.Module:
        """Build the network around the given tables.

        Args:
            inputs: the features, the embedding width and the number of numeric features.
            tables: a collection with an embedding of width D for each feature, or None if
                `uses_embeddings` is False. It returns a KeyedTensor or a dict of JaggedTensor.
            first_order: the same with embedding_dim 1, or None if `uses_first_order` is False.

        Returns:
            A module whose `forward(dense (B, I) float, sparse KeyedJaggedTensor)` returns the
            logits (B,).
        """
        self._check_tables("tables", self.uses_embeddings, tables)
        self._check_tables("first_order", self.uses_first_order, first_order)
        if tables is not None:
            check_collection("tables", tables, inputs.feature_names, inputs.embedding_dim)
        if first_order is not None:
            check_collection("first_order", first_order, inputs.feature_names, 1)
        return self._build(inputs, tables, first_order)

    @abstractmethod
    def _build(
        self, inputs: ModelInputs, tables: nn.Module | None, first_order: nn.Module | None
    ) -> nn.Module:
        """Build the network; `build` has checked the tables."""

    def _check_tables(self, role: str, used: bool, tables: nn.Module | None) -> None:
        # Tables that nobody looks up would be parameters without a gradient.
        if used != (tables is not None):
            expected, came = ("a collection", "None") if used else ("None", "a collection")
            raise ConfigError(f"{role}: {self} takes {expected} here, got {came}")


def check_collection(
    role: str, collection: nn.Module, feature_names: Sequence[str], embedding_dim: int
) -> None:
    """Raise unless a collection offers every feature with the width that the model expects.

    Modules that do not declare their tables (not one of TorchRec's collection interfaces) pass;
    what they return is checked at the first batch.
    """
    if isinstance(collection, EmbeddingBagCollectionInterface):
        configs = collection.embedding_bag_configs()
    elif isinstance(collection, EmbeddingCollectionInterface):
        configs = collection.embedding_configs()
    else:
        return
    widths = {name: config.embedding_dim for config in configs for name in config.feature_names}
    missing = [name for name in feature_names if name not in widths]
    if missing:
        raise ConfigError(
            f"{role}: expected a table for every feature, none serves {missing}; "
            f"the collection serves {sorted(widths)}"
        )
    wrong = {name: widths[name] for name in feature_names if widths[name] != embedding_dim}
    if wrong:
        raise ConfigError(
            f"{role}: expected embedding_dim={embedding_dim} for every feature, got {wrong}"
        )
