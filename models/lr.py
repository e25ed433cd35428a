"""LR: logistic regression on the ids and the numeric values, with a constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.fields import FirstOrder, Pooling


class LR(nn.Module):
    """One weight per id and per numeric feature, summed, plus a constant.

    Args:
        first_order: collection of the ids' weights (embedding_dim 1).
        feature_names: names of the F categorical features.
        num_dense: number I of numeric features, 0 for none.
        pooling: how to pool unpooled weights.
    """

    def __init__(
        self,
        first_order: nn.Module,
        *,
        feature_names: Sequence[str],
        num_dense: int,
        pooling: Pooling = "sum",
    ) -> None:
        super().__init__()
        self.first_order_tables = first_order
        self.linear = FirstOrder(feature_names, num_dense, bias=True, pooling=pooling)

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the logits (B,) for values (B, I) and ids."""
        return self.linear(dense, self.first_order_tables(sparse))


@dataclass(frozen=True, kw_only=True)
class LRConfig(ModelConfig):
    """Settings of LR: none."""

    uses_embeddings: ClassVar[bool] = False

    @property
    @override
    def uses_first_order(self) -> bool:
        return True

    def _build(
        self, inputs: ModelInputs, tables: nn.Module | None, first_order: nn.Module | None
    ) -> nn.Module:
        assert first_order is not None
        return LR(
            first_order,
            feature_names=inputs.feature_names,
            num_dense=inputs.num_dense,
            pooling=inputs.pooling,
        )
