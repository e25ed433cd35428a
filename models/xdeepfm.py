"""xDeepFM: products of ever more fields, compressed layer by layer, beside a linear part and an MLP.

Lian et al., "xDeepFM: Combining Explicit and Implicit Feature Interactions for Recommender
Systems", KDD 2018, arXiv 1803.05170. The compressed interaction network is FuxiCTR's, which the
public BARS benchmark ran: maps have a constant each (the paper's have none), no activation, and all
of them go on to the next layer (the authors' own code may split them). Departures from both: linear
maps start Xavier-normal with zero constants, and vectors of numeric features start small, as they are
multiplied with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embcomp.errors import ConfigError
from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.checks import Dropout, HiddenUnits, check_units
from embcomp.models.fields import SMALL_STD, FieldEmbeddings, FirstOrder, Pooling
from embcomp.models.layers import MLP, XavierLinear


class CompressedInteraction(nn.Module):
    """Layers of feature maps, each a mixture of the products of the fields with the maps before it.

    `x_{k+1}[u] = sum_{f, h} W_k[u, f, h] (x_0[f] * x_k[h]) + b_k[u]`, column by column. What is
    returned are the sums of all maps over their columns.

    Args:
        num_fields: number F of fields.
        map_counts: number of feature maps of each layer.
    """

    def __init__(self, num_fields: int, map_counts: Sequence[int]) -> None:
        super().__init__()
        check_maps(map_counts)
        before = (num_fields, *map_counts)
        self.layers = nn.ModuleList(
            XavierLinear(num_fields * incoming, maps) for incoming, maps in zip(before, map_counts)
        )

    def forward(self, fields: Tensor) -> Tensor:
        """Map the fields (B, F, D) to sums (B, all feature maps)."""
        first = maps = fields.transpose(1, 2)  # (B, D, F)
        sums = []
        for layer in self.layers:
            products = first.unsqueeze(3) * maps.unsqueeze(2)  # (B, D, F, maps before)
            maps = layer(products.flatten(2))  # (B, D, maps)
            sums.append(maps.sum(dim=1))
        return torch.cat(sums, dim=1)


class XDeepFM(nn.Module):
    """First-order weights, a compressed interaction network and an MLP, summed.

    Args:
        tables: collection of the embeddings (width D).
        first_order: collection of the ids' weights (embedding_dim 1).
        feature_names: names of the F categorical features.
        embedding_dim: width D.
        num_dense: number I of numeric features, 0 for none.
        cin_units: number of feature maps of each layer of the interaction network.
        hidden_units: widths of the MLP's hidden layers; empty for no MLP.
        batch_norm: whether the MLP normalises over the batch.
        dropout: probability of dropping a hidden activation of the MLP.
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
        cin_units: Sequence[int] = (64,),
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
        num_fields = self.fields.num_fields
        self.cin = CompressedInteraction(num_fields, cin_units)
        self.cin_output = XavierLinear(sum(cin_units), 1)
        check_units("hidden_units", hidden_units)
        self.dnn = None
        if hidden_units:
            self.dnn = MLP(
                num_fields * embedding_dim, hidden_units, 1, batch_norm=batch_norm, dropout=dropout
            )

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the logits (B,) for values (B, I) and ids."""
        fields = self.fields(dense, self.tables(sparse))  # (B, I + F, D)
        logits = self.linear(dense, self.first_order_tables(sparse))  # (B,)
        logits = logits + self.cin_output(self.cin(fields)).squeeze(1)
        if self.dnn is not None:
            logits = logits + self.dnn(fields.flatten(1)).squeeze(1)
        return logits


@dataclass(frozen=True, kw_only=True)
class XDeepFMConfig(ModelConfig):
    """Settings of xDeepFM; see `XDeepFM`."""

    cin_units: HiddenUnits = (64,)
    hidden_units: HiddenUnits = (400, 400, 400)
    batch_norm: bool = False
    dropout: Dropout = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_maps(self.cin_units)

    @property
    @override
    def uses_first_order(self) -> bool:
        return True

    def _build(
        self, inputs: ModelInputs, tables: nn.Module | None, first_order: nn.Module | None
    ) -> nn.Module:
        assert tables is not None
        assert first_order is not None
        return XDeepFM(
            tables,
            first_order,
            feature_names=inputs.feature_names,
            embedding_dim=inputs.embedding_dim,
            num_dense=inputs.num_dense,
            cin_units=self.cin_units,
            hidden_units=self.hidden_units,
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            pooling=inputs.pooling,
        )


def check_maps(map_counts: Sequence[int]) -> None:
    """Raise unless there is at least one layer, each with at least one feature map."""
    check_units("cin_units", map_counts)
    if not map_counts:
        raise ConfigError(
            "cin_units=[]: expected at least one layer of feature maps, such as [64]; "
            "widedeep is the model without"
        )
