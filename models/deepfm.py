"""DeepFM: FM and an MLP on the same embeddings.

Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", IJCAI 2017,
arXiv 1703.04247. The only constant is the one of the MLP's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.checks import Dropout, HiddenUnits
from embcomp.models.fields import SMALL_STD, FieldEmbeddings, FirstOrder, Pooling
from embcomp.models.layers import MLP, FactorizationMachine


class DeepFM(nn.Module):
    """First-order weights, second-order interactions and an MLP, summed.

    Args:
        tables: collection of the embeddings (width D).
        first_order: collection of the ids' weights (embedding_dim 1).
        feature_names: names of the F categorical features.
        embedding_dim: width D.
        num_dense: number I of numeric features, 0 for none.
        hidden_units: widths of the MLP's hidden layers.
        batch_norm: whether the MLP normalises over the batch.
        dropout: probability of dropping a hidden activation.
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
        hidden_units: Sequence[int] = (400, 400, 400),
        batch_norm: bool = False,
        dropout: float = 0.0,
        pooling: Pooling = "sum",
    ) -> None:
        super().__init__()
        self.tables = tables
        self.first_order_tables = first_order
        self.fields = FieldEmbeddings(
            feature_names, embedding_dim, num_dense, pooling=pooling, numeric_std=SMALL_STD
        )
        self.linear = FirstOrder(feature_names, num_dense, bias=False, pooling=pooling)
        self.second_order = FactorizationMachine()
        self.dnn = MLP(
            self.fields.num_fields * embedding_dim,
            hidden_units,
            1,
            batch_norm=batch_norm,
            dropout=dropout,
        )

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the logits (B,) for values (B, I) and ids."""
        fields = self.fields(dense, self.tables(sparse))  # (B, I + F, D)
        linear = self.linear(dense, self.first_order_tables(sparse))  # (B,)
        return linear + self.second_order(fields) + self.dnn(fields.flatten(1)).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class DeepFMConfig(ModelConfig):
    """Settings of DeepFM; see `DeepFM`."""

    hidden_units: HiddenUnits = (400, 400, 400)
    batch_norm: bool = False
    dropout: Dropout = 0.0

    @property
    @override
    def uses_first_order(self) -> bool:
        return True

    def _build(
        self, inputs: ModelInputs, tables: nn.Module | None, first_order: nn.Module | None
    ) -> nn.Module:
        assert tables is not None
        assert first_order is not None
        return DeepFM(
            tables,
            first_order,
            feature_names=inputs.feature_names,
            embedding_dim=inputs.embedding_dim,
            num_dense=inputs.num_dense,
            hidden_units=self.hidden_units,
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            pooling=inputs.pooling,
        )
