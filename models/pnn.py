"""PNN with inner products (IPNN): an MLP on the fields and the inner products of all their pairs.

Qu et al., "Product-based Neural Networks for User Response Prediction", ICDM 2016, arXiv 1611.00144.
As in FuxiCTR, which the public BARS benchmark ran, products and fields meet in the MLP's first layer
as they are; the paper gives each a linear map of its own before, and factorises that of the products.
Departures from FuxiCTR: vectors of numeric features start small, as they are multiplied with each
other. Outer products are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.checks import Dropout, HiddenUnits, check_two_fields
from embcomp.models.fields import SMALL_STD, FieldEmbeddings, Pooling
from embcomp.models.layers import MLP, PairwiseDots


class PNN(nn.Module):
    """An MLP on the flattened fields beside the inner products of all pairs.

    Args:
        tables: collection of the embeddings (width D).
        feature_names: names of the F categorical features; with the numeric ones at least two.
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
        check_two_fields("pnn", feature_names, num_dense)
        self.tables = tables
        self.fields = FieldEmbeddings(
            feature_names, embedding_dim, num_dense, pooling=pooling, numeric_std=SMALL_STD
        )
        self.products = PairwiseDots()
        num_fields = self.fields.num_fields
        self.dnn = MLP(
            num_fields * embedding_dim + num_fields * (num_fields - 1) // 2,
            hidden_units,
            1,
            batch_norm=batch_norm,
            dropout=dropout,
        )

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the logits (B,) for values (B, I) and ids."""
        fields = self.fields(dense, self.tables(sparse))  # (B, I + F, D)
        return self.dnn(torch.cat([fields.flatten(1), self.products(fields)], dim=1)).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class PNNConfig(ModelConfig):
    """Settings of PNN; see `PNN`."""

    hidden_units: HiddenUnits = (400, 400, 400)
    batch_norm: bool = False
    dropout: Dropout = 0.0

    def _build(
        self, inputs: ModelInputs, tables: nn.Module | None, first_order: nn.Module | None
    ) -> nn.Module:
        assert tables is not None
        return PNN(
            tables,
            feature_names=inputs.feature_names,
            embedding_dim=inputs.embedding_dim,
            num_dense=inputs.num_dense,
            hidden_units=self.hidden_units,
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            pooling=inputs.pooling,
        )
