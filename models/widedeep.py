"""Wide & Deep: a linear part and an MLP on the embeddings, summed.

Cheng et al., "Wide & Deep Learning for Recommender Systems", DLRS 2016, arXiv 1606.07792.
Deviation from the paper: the wide part sees the features alone, no hand-made crosses; the only
constant is the one of the MLP's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.checks import Dropout, HiddenUnits
from embcomp.models.fields import FieldEmbeddings, FirstOrder, Pooling
from embcomp.models.layers import MLP


class WideDeep(nn.Module):
    """First-order weights and an MLP, summed.

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
        self.fields = FieldEmbeddings(feature_names, embedding_dim, num_dense, pooling=pooling)
        self.linear = FirstOrder(feature_names, num_dense, bias=False, pooling=pooling)
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
        wide = self.linear(dense, self.first_order_tables(sparse))  # (B,)
        return wide + self.dnn(fields.flatten(1)).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class WideDeepConfig(ModelConfig):
    """Settings of Wide & Deep; see `WideDeep`."""

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
        return WideDeep(
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
