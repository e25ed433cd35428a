"""FiBiNET: fields weighed by what they hold, products of pairs through learnt matrices, an MLP.

Huang et al., "FiBiNET: Combining Feature Importance and Bilinear feature Interaction for
Click-Through Rate Prediction", RecSys 2019, arXiv 1905.09433. The settings and their totals are those
of the public BARS benchmark: one set of matrices multiplies the fields and the weighed fields alike
(`share_bilinear`; FuxiCTR's later versions have two), and a linear part without a constant is added.
Departures from both: each matrix starts Xavier-normal by its own widths, `field_each` has no matrix
for the last field, which comes first in no pair and would get no gradient, and vectors of numeric
features start small, as they are multiplied with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.checks import (
    Dropout,
    HiddenUnits,
    Ratio,
    check_choice,
    check_ratio,
    check_two_fields,
)
from embcomp.models.fields import SMALL_STD, FieldEmbeddings, FirstOrder, Pooling
from embcomp.models.layers import MLP, XavierLinear, pairs_of_fields

Bilinear = Literal["field_all", "field_each", "field_interaction"]
BILINEARS: tuple[Bilinear, ...] = ("field_all", "field_each", "field_interaction")
Excitation = Literal["relu", "sigmoid"]
EXCITATIONS: tuple[Excitation, ...] = ("relu", "sigmoid")


class SqueezeExcitation(nn.Module):
    """Weighs each field by a small network on the means of all fields.

    Args:
        num_fields: number F of fields.
        reduction_ratio: how many times narrower than F the hidden layer is; it has at least one unit.
        excitation: what the weights go through: "relu" or "sigmoid".
    """

    def __init__(self, num_fields: int, reduction_ratio: float, excitation: Excitation) -> None:
        super().__init__()
        check_ratio("reduction_ratio", reduction_ratio)
        check_choice("excitation", excitation, EXCITATIONS)
        hidden = max(1, int(num_fields / reduction_ratio))
        self.squeeze = XavierLinear(num_fields, hidden, bias=False)
        self.excite = XavierLinear(hidden, num_fields, bias=False)
        self.excitation = excitation

    def forward(self, fields: Tensor) -> Tensor:
        """Weigh the fields (B, F, D)."""
        weights = self.excite(self.squeeze(fields.mean(dim=2)).relu())  # (B, F)
        weights = weights.relu() if self.excitation == "relu" else weights.sigmoid()
        return fields * weights.unsqueeze(2)


class BilinearInteraction(nn.Module):
    """Products of all pairs of fields `(x_i W) * x_j`, i before j, column by column.

    Args:
        num_fields: number F of fields.
        embedding_dim: width D.
        bilinear: which matrix W multiplies the first field of a pair: "field_all": one for all;
            "field_each": the field's own; "field_interaction": the pair's own.
    """

    def __init__(self, num_fields: int, embedding_dim: int, bilinear: Bilinear) -> None:
        super().__init__()
        check_choice("bilinear", bilinear, BILINEARS)
        self.bilinear = bilinear
        matrices = {
            "field_all": 1,
            "field_each": num_fields - 1,
            "field_interaction": num_fields * (num_fields - 1) // 2,
        }[bilinear]
        self.weight = nn.Parameter(torch.empty(matrices, embedding_dim, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every matrix Xavier-normal by its own widths."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, fields: Tensor) -> Tensor:
        """Map the fields (B, F, D) to products (B, F * (F - 1) / 2, D), ordered by first field."""
        first, second = pairs_of_fields(fields.shape[1], fields.device)
        if self.bilinear == "field_interaction":
            mapped = _each_by_its_own(fields.index_select(1, first), self.weight)
        elif self.bilinear == "field_each":
            mapped = _each_by_its_own(fields[:, :-1], self.weight).index_select(1, first)
        else:
            mapped = (fields @ self.weight[0]).index_select(1, first)
        return mapped * fields.index_select(1, second)


def _each_by_its_own(fields: Tensor, weight: Tensor) -> Tensor:
    """Multiply fields (B, N, D) by matrices (N, D, D)."""
    return torch.bmm(fields.transpose(0, 1), weight).transpose(0, 1)


class FiBiNET(nn.Module):
    """First-order weights, and an MLP on the products of the fields and of the weighed fields.

    Args:
        tables: collection of the embeddings (width D).
        first_order: collection of the ids' weights (embedding_dim 1).
        feature_names: names of the F categorical features; with the numeric ones at least two.
        embedding_dim: width D.
        num_dense: number I of numeric features, 0 for none.
        reduction_ratio: how many times narrower than the fields are many the hidden layer is that
            weighs them.
        excitation: what the fields' weights go through: "relu" or "sigmoid".
        bilinear: which matrices multiply: "field_all", "field_each" or "field_interaction", see
            `BilinearInteraction`.
        share_bilinear: whether the same matrices multiply the fields and the weighed fields.
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
        reduction_ratio: float = 3.0,
        excitation: Excitation = "relu",
        bilinear: Bilinear = "field_interaction",
        share_bilinear: bool = True,
        hidden_units: Sequence[int] = (400, 400, 400),
        batch_norm: bool = False,
        dropout: float = 0.0,
        pooling: Pooling = "sum",
    ) -> None:
        super().__init__()
        check_two_fields("fibinet", feature_names, num_dense)
        self.tables = tables
        self.first_order_tables = first_order
        self.fields = FieldEmbeddings(
            feature_names, embedding_dim, num_dense, pooling=pooling, numeric_std=SMALL_STD
        )
        self.linear = FirstOrder(feature_names, num_dense, bias=False, pooling=pooling)
        num_fields = self.fields.num_fields
        self.weigh = SqueezeExcitation(num_fields, reduction_ratio, excitation)
        self.products = BilinearInteraction(num_fields, embedding_dim, bilinear)
        self.weighed_products = None
        if not share_bilinear:
            self.weighed_products = BilinearInteraction(num_fields, embedding_dim, bilinear)
        self.dnn = MLP(
            num_fields * (num_fields - 1) * embedding_dim,
            hidden_units,
            1,
            batch_norm=batch_norm,
            dropout=dropout,
        )

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the logits (B,) for values (B, I) and ids."""
        fields = self.fields(dense, self.tables(sparse))  # (B, I + F, D)
        linear = self.linear(dense, self.first_order_tables(sparse))  # (B,)
        products = self.products(fields)  # (B, pairs, D)
        if self.weighed_products is None:
            weighed = self.products(self.weigh(fields))
        else:
            weighed = self.weighed_products(self.weigh(fields))
        return linear + self.dnn(torch.cat([products, weighed], dim=1).flatten(1)).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class FiBiNETConfig(ModelConfig):
    """Settings of FiBiNET; see `FiBiNET`."""

    reduction_ratio: Ratio = 3.0
    excitation: Excitation = "relu"
    bilinear: Bilinear = "field_interaction"
    share_bilinear: bool = True
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
        return FiBiNET(
            tables,
            first_order,
            feature_names=inputs.feature_names,
            embedding_dim=inputs.embedding_dim,
            num_dense=inputs.num_dense,
            reduction_ratio=self.reduction_ratio,
            excitation=self.excitation,
            bilinear=self.bilinear,
            share_bilinear=self.share_bilinear,
            hidden_units=self.hidden_units,
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            pooling=inputs.pooling,
        )
