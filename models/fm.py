"""FM: linear part plus the inner products of all pairs of fields.

Rendle, "Factorization Machines", ICDM 2010.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.fields import SMALL_STD, FieldEmbeddings, FirstOrder, Pooling
from embcomp.models.layers import FactorizationMachine


class FM(nn.Module):
    """First-order weights, second-order interactions and a constant.

    Args:
        tables: collection of the embeddings (width D).
        first_order: collection of the ids' weights (embedding_dim 1).
        feature_names: names of the F categorical features.
        embedding_dim: width D.
        num_dense: number I of numeric features, 0 for none.
        pooling: how to pool unpooled rows.
    """

    def __init__(
        self,
        tables: nn.Module,
        first_order: nn.Module,
        *,
        feature_names: Sequence[str],
        embedding_dim: int,
        num_dense: int,
        pooling: Pooling = "sum",
    ) -> None:
        super().__init__()
        self.tables = tables
        self.first_order_tables = first_order
        self.fields = FieldEmbeddings(
            feature_names, embedding_dim, num_dense, pooling=pooling, numeric_std=SMALL_STD
        )
        self.linear = FirstOrder(feature_names, num_dense, bias=True, pooling=pooling)
        self.second_order = FactorizationMachine()

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the logits (B,) for values (B, I) and ids."""
        fields = self.fields(dense, self.tables(sparse))  # (B, I + F, D)
        linear = self.linear(dense, self.first_order_tables(sparse))  # (B,)
        return linear + self.second_order(fields)


@dataclass(frozen=True, kw_only=True)
class FMConfig(ModelConfig):
    """Settings of FM: none."""

    @property
    @override
    def uses_first_order(self) -> bool:
        return True

    def _build(
        self, inputs: ModelInputs, tables: nn.Module | None, first_order: nn.Module | None
    ) -> nn.Module:
        assert tables is not None
        assert first_order is not None
        return FM(
            tables,
            first_order,
            feature_names=inputs.feature_names,
            embedding_dim=inputs.embedding_dim,
            num_dense=inputs.num_dense,
            pooling=inputs.pooling,
        )
